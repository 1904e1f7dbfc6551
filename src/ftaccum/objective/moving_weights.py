"""Weights that each forward pass moves further, such as those of a momentum encoder or a counter."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..runtime.state_guards import preserve_buffers
from .deterministic_forward import DeterministicMode
from .hidden_state import HiddenState, Run

_ROUNDING = 1e-6  # of a weight that is normalized again
_NOISE, _OFFSET = 0.1, 0.01


def find_moving_weights(
    model: nn.Module, modules: Sequence[nn.Module], run: Run, written: Mapping[str, nn.Parameter]
) -> HiddenState:
    """Find out which of the weights that a pass writes to move again in a second pass, which then gives another loss.

    Weights that a pass normalizes or clamps do not move again, and a counter may have no effect on the loss. The
    weights get noise first, because a momentum encoder often starts as a copy of the trained one, and then moves only
    by rounding. All weights are restored.

    Args:
        modules: the modules that compute the loss, besides the model.
        run: runs a few rows, and returns the loss by term.
        written: the weights that a pass writes to, by name.
    """
    if not written:
        return HiddenState()
    before = {p: p.data for p in written.values()}
    draw = torch.Generator().manual_seed(0)
    losses, after = [], list[dict[str, Tensor]]()
    try:
        for p, data in before.items():
            p.data = _noisy(data, draw)  # not in place, so that the weights themselves stay as they are
        with DeterministicMode(model, True, {}, modules).passes():
            for _ in range(2):
                with preserve_buffers(model, *modules):
                    losses.append(run())
                after.append({name: p.detach().clone() for name, p in written.items()})
    finally:
        for p, data in before.items():
            p.data = data
    if losses[0] == losses[1]:
        return HiddenState()
    moved = {name: _difference(after[0][name], after[1][name]) for name in written}
    places = [f"the weight `{name}`" for name, off in moved.items() if off > _ROUNDING]
    return HiddenState(max(moved.values()), places, in_weights=True) if places else HiddenState()


def _noisy(weight: Tensor, draw: torch.Generator) -> Tensor:
    if not weight.is_floating_point():
        return weight.clone()
    noise = torch.randn(weight.shape, generator=draw).to(weight.device, weight.dtype)
    return weight * (1 + _NOISE * noise) + _OFFSET * noise


def _difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two weights, relative to the largest number."""
    if not one.numel():
        return 0.0
    largest = torch.maximum(one.abs().max(), other.abs().max()).item()
    return (one - other).abs().max().item() / (largest or 1.0)
