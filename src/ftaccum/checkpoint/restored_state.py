"""Saved nested state as this run needs it: with sharded tensors where its weights are sharded."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..runtime.sharding.layout import Layout
from .best_weights import assign
from .saved_tensors import SavedTensor, SavedTensors
from .shard_index import Box
from .shards import REFERENCE


class StateRestorer:
    """Restores the tensors in nested state: those that the checkpoint has in shards, and whole ones to be sharded."""

    def __init__(self, saved: SavedTensors, model: nn.Module) -> None:
        """Create a restorer.

        Args:
            saved: the tensors of the checkpoint.
            model: the model of this run.
        """
        self._saved = saved
        self._mesh = next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)

    def restore(self, value: Any, weight: Tensor | None = None) -> Any:
        """Return nested state laid out for this run. Each process reads only its own part.

        Args:
            weight: the weight whose state this is, if any. Its state is shared between processes as it is.

        Raises:
            KeyError, ValueError: if the checkpoint does not have all of a tensor.
        """
        if isinstance(value, Tensor):
            is_whole = not isinstance(weight, DTensor) or not value.ndim
            if is_whole:
                return value if self._mesh is None else value.clone()  # the file is mapped, and may be removed
            return self._sharded(SavedTensorInMemory(value), weight)
        if isinstance(value, Mapping):
            if value.keys() == {REFERENCE}:
                return self._read(self._saved.sharded[value[REFERENCE]], weight)
            return {key: self.restore(item, weight) for key, item in value.items()}
        if isinstance(value, list | tuple):
            items = [self.restore(item, weight) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    def _read(self, saved: SavedTensor, weight: Tensor | None) -> Tensor:
        if self._mesh is None or not (weight is None or isinstance(weight, DTensor)):
            return saved.read()
        return self._sharded(saved, weight)

    def _sharded(self, saved: "SavedTensor | SavedTensorInMemory", weight: Tensor | None) -> Tensor:
        assert self._mesh is not None, "this run's model is sharded"
        if isinstance(weight, DTensor) and tuple(weight.shape) == saved.shape:
            part = saved.read(Box(*Layout.of(weight).local_box()))
            state = torch.empty_like(weight.detach(), dtype=part.dtype)  # on its device, which offloading changes
            assign(state, part)
            return state
        copies = (None,) * self._mesh.ndim
        dims = saved.sharded_dims if saved.sharded_dims and len(saved.sharded_dims) == len(copies) else copies
        layout = Layout(saved.shape, self._mesh, dims)
        return layout.assemble(saved.read(Box(*layout.local_box())))


class SavedTensorInMemory:
    """A whole tensor that has been read already, with the interface of a `SavedTensor`."""

    sharded_dims = None

    def __init__(self, values: Tensor) -> None:
        self.shape, self._values = tuple(values.shape), values

    def read(self, box: Box) -> Tensor:
        """Return the part in a box."""
        return self._values[box.within(Box.whole(self.shape))].clone()
