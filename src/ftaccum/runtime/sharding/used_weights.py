"""Record which weights got a gradient in a window. FSDP2 does not report this."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from ..process_group import ProcessGroup


class UsedWeights:
    """Records which weights of a sharded model get a gradient.

    All processes reduce the gradients of all weights, with zeros for those that none of their rows use. But a weight
    that no row uses must have no gradient: an optimizer moves any weight that has one, by its decay and momentum.

    Attributes:
        is_recording: whether passes count.
        gathered: the ids of the gathered weights that are trained.
    """

    def __init__(self, model: nn.Module, units: Sequence[FSDPModule]) -> None:
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        self._by_module: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
        self._used: set[str] = set()
        self._watched: list[Tensor] = []  # keeps them alive, so that no other tensor gets their id
        self.gathered: set[int] = set()
        self.is_recording = True
        self._units = units
        self._hooks: list[RemovableHandle] = []

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Add the hooks that record to the model, and return their handles."""
        inside = {id(part) for unit in self._units for part in unit.modules()}  # type: ignore[attr-defined]
        handles = [model.register_forward_pre_hook(lambda *_: self._watch(model, skipped=inside))]
        for unit in self._units:
            module: Any = unit
            handles.append(module.register_forward_pre_hook(lambda module, *_: self._watch(module)))
        return handles

    def agreed(self, process_group: ProcessGroup) -> set[str]:
        """Return the names of the weights that have had a gradient on any process, and begin anew."""
        flags = process_group.any_of(name in self._used for name in self._names)
        self._used.clear()
        return {name for name, used in zip(self._names, flags, strict=True) if used}

    def close(self) -> None:
        """Remove the hooks from the weights: with them, the model would stay in memory when nobody holds it."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._watched.clear()

    def forget(self) -> None:
        """Forget an abandoned window."""
        self._used.clear()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _watch(self, module: nn.Module, skipped: set[int] | None = None) -> None:
        """Watch the weights of a module that has just gathered them."""
        prefix = self._by_module[module]
        for name, part in module.named_modules(prefix=prefix):
            if skipped is not None and id(part) in skipped:
                continue
            for own, p in part.named_parameters(recurse=False):
                if p.requires_grad and id(p) not in self.gathered:
                    self.gathered.add(id(p))
                    self._watched.append(p)
                    full_name = f"{name}.{own}" if name else own
                    self._hooks.append(p.register_post_accumulate_grad_hook(partial(self._record, full_name)))

    def _record(self, name: str, _: Tensor) -> None:
        if self.is_recording:
            self._used.add(name)
