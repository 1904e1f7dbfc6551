"""Whether the weights at the end of a run are those of its last evaluation."""

import torch
from torch import Tensor, nn

from ..checkpoint.best_weights import weights_of
from ..runtime.process_group import ProcessGroup
from ..runtime.sharding.tensors import local_part

_ROUNDING = 1e-6  # an optimizer that switches between weights rounds them


class EvaluatedWeights:
    """The norms of the weights at the last evaluation.

    Only callbacks can make the last evaluated weights others than those that are saved: they may evaluate an average of
    the weights and not save it, or change the weights after the last evaluation.
    """

    def __init__(self, is_needed: bool, process_group: ProcessGroup) -> None:
        """Args:
        is_needed: whether there are callbacks. Otherwise, no norms are computed.
        """
        self._is_needed, self._process_group = is_needed, process_group
        self._norms: Tensor | None = None

    def take(self, model: nn.Module) -> None:
        """Take the norms of the weights that have just been evaluated."""
        if self._is_needed:
            self._norms = _norms_of(model)

    def differ_from(self, model: nn.Module) -> bool:
        """Return whether a model has other weights. All processes must call this together."""
        if not self._is_needed:
            return False
        known, now = self._norms, _norms_of(model)
        same = known is None or _are_equal(known, now)
        return self._process_group.any(not same)


def _are_equal(known: Tensor, now: Tensor) -> bool:
    return len(known) == len(now) and torch.allclose(known, now, rtol=_ROUNDING, atol=0.0, equal_nan=True)


def _norms_of(model: nn.Module) -> Tensor:
    weights = [local_part(t.detach()) for t in weights_of(model).values() if t.is_floating_point()]
    norms = [t.norm(dtype=torch.promote_types(t.dtype, torch.float32)).cpu().double() for t in weights]
    return torch.stack(norms) if norms else torch.zeros(0)
