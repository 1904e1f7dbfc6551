"""Save and load the state of an optimizer and of the optimizers that it contains."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..runtime.log import logger
from ..runtime.optimizers import inner_optimizers, keep_groups
from .serialization import holds_same


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer and, under `inner`, of the optimizers that it contains.

    A class that overrides `state_dict` is trusted to include inner optimizers, so `inner` is empty then. torch's
    `state_dict` leaves them out, for example the moments of the optimizer that a SAM optimizer wraps.
    """
    holds_all = type(optimizer).state_dict is not Optimizer.state_dict
    inner = [] if holds_all else inner_optimizers(optimizer)
    return {
        "optimizer": _without_functions(optimizer.state_dict()),
        "inner": [_without_functions(each.state_dict()) for each in inner],
    }


def load_optimizer_state(optimizer: Optimizer, saved: Mapping[str, Any], *, own_numbers: bool) -> None:
    """Load what `optimizer_state` returned.

    Args:
        own_numbers: whether to keep the hyperparameters of this run's parameter groups.
    """
    inner = inner_optimizers(optimizer)
    numbers = [(group, dict(group)) for each in (optimizer, *inner) for group in each.param_groups]
    with keep_groups([optimizer, *inner]):
        _load(optimizer, saved["optimizer"])
        for each, state in zip(inner, saved.get("inner", []), strict=False):
            _load(each, state)
    for group, before in numbers if own_numbers else []:
        group.update(before)


def _load(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    if _is_of_torch(saved):
        own = optimizer.state_dict()["param_groups"]  # functions in the groups are not in the checkpoint
        groups = [mine | group for mine, group in zip(own, saved["param_groups"], strict=True)]
        _load_exactly(optimizer, saved["state"], groups)
        return
    optimizer.load_state_dict(saved)
    if not holds_same(saved, optimizer.state_dict()):
        logger.warning(
            f"The state that {type(optimizer).__name__} loaded (`load_state_dict`) differs from the one that it saved "
            "(`state_dict`). The resumed run may differ from an uninterrupted one. Fix these two methods."
        )


def _load_exactly(optimizer: Optimizer, state: dict[int, Any], groups: list[dict[str, Any]]) -> None:
    """Load a state exactly, with the tensors' types and memory layout.

    `load_state_dict` casts the moments to the weight's type. The moments of a non-contiguous weight must have its
    memory layout, or sums round differently.
    """
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state.items():
        weight, own = held[index], optimizer.state[held[index]]
        for name, value in values.items():
            if isinstance(value, Tensor) and own[name].dtype != value.dtype:
                own[name] = value.to(own[name].device)
            if isinstance(value, Tensor) and value.shape == weight.shape and not weight.is_contiguous():
                own[name] = torch.empty_like(weight, dtype=value.dtype, requires_grad=False).copy_(value)


def _without_functions(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state without functions in its parameter groups; they come with the optimizer."""
    if not _is_of_torch(state):
        return state
    groups = [{k: v for k, v in group.items() if not callable(v)} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _is_of_torch(state: Mapping[str, Any]) -> bool:
    return {"state", "param_groups"} <= state.keys()
