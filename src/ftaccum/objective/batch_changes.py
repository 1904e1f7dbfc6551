"""Changes that a forward pass makes to its batch: copies that protect the rows, and a watch on the changes."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor, nn

from ..runtime.state_guards import TensorVersions
from .item_counts import Batch
from .model_forward import is_label


def fresh_batch(batch: Batch, device: torch.device) -> Batch:
    """Return a copy of a batch on a device for one forward pass, so that the pass cannot change the batch itself.

    The batch may be needed again (memory runs out, an update is audited), and its tensors may be the user's own rows.
    """
    copied = recursively_apply(lambda t: t.to(device, non_blocking=True, copy=True), batch)
    return send_to_device(copied, device)  # moves other objects that have a `to` method


def fresh_batch_for(model: nn.Module, batch: Batch) -> Batch:
    """Return the same as `fresh_batch`, on the device of a model's first parameter."""
    return fresh_batch(batch, next(model.parameters()).device)


class WatchedBatch:
    """A batch that shows what a forward pass changed in it.

    Attributes:
        batch: the batch to run the pass on.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self._columns = dict(batch) if isinstance(batch, Mapping) else {}
        self._versions = TensorVersions(_named_tensors(batch))

    def changed(self) -> list[str]:
        """Return the names of the tensors that the pass wrote to or replaced. Removing a tensor is no change."""
        now = self.batch if isinstance(self.batch, Mapping) else {}
        replaced = [name for name, value in now.items() if self._columns.get(name, value) is not value]
        return list(dict.fromkeys([*self._versions.changed(), *replaced]))

    def changed_targets(self, before: Batch) -> str:
        """Return, for a message, the names of the targets whose values differ from those before the pass."""
        then, now = _named_tensors(before), _named_tensors(self.as_seen())
        changed = [name for name in now if name in then and _is_target(name) and not _equal(then[name], now[name])]
        return ", ".join(f"`{name}`" for name in changed)

    def as_seen(self) -> Batch:
        """Return the batch as the loss saw it, on the CPU."""
        seen = {**self._columns, **self.batch} if isinstance(self.batch, Mapping) else self.batch
        return send_to_device(seen, "cpu")


def _is_target(name: str) -> bool:
    return is_label(name) or name.startswith("targets")


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.cpu(), other.to(one.dtype))


def _named_tensors(batch: Any, name: str = "") -> dict[str, Tensor]:
    if isinstance(batch, Tensor):
        return {name or "the batch": batch}
    if isinstance(batch, Mapping):
        parts = [(str(key), value) for key, value in batch.items()]
    elif isinstance(batch, list | tuple):
        names = ("inputs", "targets") if not name and len(batch) == 2 else [f"{name}[{n}]" for n in range(len(batch))]
        parts = list(zip(names, batch, strict=True))
    else:
        return {}
    return {key: tensor for part, value in parts for key, tensor in _named_tensors(value, part).items()}
