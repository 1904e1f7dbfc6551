"""Put whole weights into a sharded model on the main process while it is saved."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..adapters import is_peft_model, saved_by_peft
from ..model_wrapper import model_to_save
from ..process_group import ProcessGroup
from .layout import reshard, unsharded_class
from .scratch_file import ScratchFile
from .tensors import is_sharded, whole_tensor


class WholeWeights:
    """The whole weights of a sharded model, mapped from a file on the main process.

    Attributes:
        fault: the error that kept the weights from being gathered, if any. The other processes may have None.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._whole: dict[int, nn.Parameter] = {}  # by the id of the sharded weight
        self.fault: Exception | None = None

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Put the whole weights into the model, and the sharded ones back on exit. Only the main process calls this.

        The model can then be saved as if it were not sharded. Weights that were not gathered, such as the frozen ones
        of a PEFT model, are on torch's meta device. Nothing happens to a model that is not sharded.

        Raises:
            Exception: the error that kept the weights from being gathered.
        """
        if self.fault is not None:
            raise self.fault
        if not is_sharded(self._model):
            yield
            return
        with _without_shards(self._model, self._whole):
            yield

    def gather(self, folder: Path, process_group: ProcessGroup) -> None:
        """Gather the weights one at a time, and write each to a file on the main process. All processes call this."""
        try:
            sharded = _to_gather(self._model, process_group)
        except Exception as error:  # on all processes
            self.fault = error
            return
        file = self._file_in(folder) if process_group.is_main else None
        for p in sharded:
            self._append(file, whole_tensor(p.detach()))  # also after a failure, as the other processes wait for it
        if file is not None:
            self._map(file, sharded)

    def release(self) -> None:
        """Free the file."""
        self._whole.clear()

    def _file_in(self, folder: Path) -> ScratchFile | None:
        try:
            return ScratchFile(folder)
        except Exception as error:
            self.fault = error
        return None

    def _append(self, file: ScratchFile | None, tensor: torch.Tensor) -> None:
        if file is None or self.fault is not None:
            return
        try:
            file.append(tensor)
        except Exception as error:
            self.fault = error.with_traceback(None)  # which would keep the tensor

    def _map(self, file: ScratchFile, sharded: list[nn.Parameter]) -> None:
        try:
            if self.fault is None:
                for p, whole in zip(sharded, file.tensors(), strict=True):
                    self._whole[id(p)] = nn.Parameter(whole, requires_grad=p.requires_grad)
        except Exception as error:
            self.fault = error
        finally:
            file.close()


@contextmanager
def whole_weights(model: nn.Module, folder: Path, process_group: ProcessGroup) -> Iterator[WholeWeights]:
    """Gather what is saved of a sharded model. All processes enter together, and no error is raised.

    One weight at a time is gathered. The main process writes it to a file, so that neither a device nor the host ever
    holds the whole model. All weights of a PEFT model that are not saved stay as they are. If the model
    is not sharded, this does nothing.

    Args:
        folder: where the main process puts the file, which has no name and is gone on exit. It takes as much space as
            the weights.
    """
    weights = WholeWeights(model)
    if is_sharded(model):
        weights.gather(folder, process_group)
    try:
        yield weights
    finally:
        weights.release()


def _to_gather(model: nn.Module, process_group: ProcessGroup) -> list[nn.Parameter]:
    """Return the sharded weights that are saved, tied ones once, in the same order on all processes."""
    reshard(model)  # the outermost unit may still be whole after a forward pass
    inner: nn.Module = model_to_save(model)
    weights = {name: p for name, p in inner.named_parameters() if isinstance(p, DTensor)}
    if not is_peft_model(inner):
        return list(weights.values())
    saved = set(process_group.run_on_main(lambda: _saved_by_peft(inner)))  # PEFT may ask the hub, which may answer once
    return [p for name, p in weights.items() if name in saved]


def _saved_by_peft(model: nn.Module) -> list[str]:
    with _without_shards(model, {}):  # PEFT may compute with weights, which sharded ones would need all processes for
        return saved_by_peft(model)


@contextmanager
def _without_shards(model: nn.Module, whole: Mapping[int, nn.Parameter]) -> Iterator[None]:
    """Replace sharded weights by whole ones, or by empty ones on the meta device, and classes of FSDP by the model's.

    Transformers looks at the class of a model to name it in the configuration and to find the file with its code.
    """
    replacements = dict(whole)
    modules = list(model.modules())
    classes = [(module, type(module)) for module in modules if isinstance(module, FSDPModule)]
    places = [
        (module, name, p) for module in modules for name, p in module._parameters.items() if isinstance(p, DTensor)
    ]
    try:
        for module, name, p in places:
            module._parameters[name] = replacements.setdefault(id(p), _empty_like(p))
        for module, _ in classes:
            module.__class__ = unsharded_class(module)
        yield
    finally:
        for module, name, p in places:
            module._parameters[name] = p
        for module, sharded_class in classes:
            module.__class__ = sharded_class


def _empty_like(p: Any) -> nn.Parameter:
    return nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=p.requires_grad)
