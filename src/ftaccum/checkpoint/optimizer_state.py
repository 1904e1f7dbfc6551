"""Save and load the state of an optimizer and of the optimizers that it contains."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import CheckpointError
from ..runtime.log import logger
from ..runtime.optimizers import inner_optimizers, keep_groups, parameters_of
from .serialization import holds_same


def optimizer_state(optimizer: Optimizer, names: Mapping[int, str] | None = None) -> dict[str, Any]:
    """Return the state of an optimizer and, under `inner`, of the optimizers that it contains.

    Args:
        names: the names of weights, by `id`, to be used in place of their numbers.

    A class that overrides `state_dict` is trusted to include inner optimizers, so `inner` is empty then. torch's
    `state_dict` leaves them out, for example the moments of the optimizer that a SAM optimizer wraps.
    """
    holds_all = type(optimizer).state_dict is not Optimizer.state_dict
    inner = [] if holds_all else inner_optimizers(optimizer)
    return {
        "optimizer": _state_of(optimizer, names),
        "inner": [_state_of(each, names) for each in inner],
    }


def load_optimizer_state(
    optimizer: Optimizer,
    saved: Mapping[str, Any],
    *,
    own_numbers: bool,
    names: Mapping[int, str],
    restore: Callable[[Any, Tensor | None], Any],
) -> None:
    """Load what `optimizer_state` returned.

    Args:
        own_numbers: whether to keep the hyperparameters of this run's parameter groups.
        names: the names of weights, by `id`.
        restore: returns saved state, given the weight that it belongs to or None, with its tensors as this run needs
            them.

    Raises:
        CheckpointError, ValueError: if the saved state is of other weights.
    """
    inner = inner_optimizers(optimizer)
    numbers = [(group, dict(group)) for each in (optimizer, *inner) for group in each.param_groups]
    with keep_groups([optimizer, *inner]):
        _load(optimizer, saved["optimizer"], names, restore)
        for each, state in zip(inner, saved.get("inner", []), strict=False):
            _load(each, state, names, restore)
    for group, before in numbers if own_numbers else []:
        group.update(before)


def _load(
    optimizer: Optimizer,
    saved: dict[str, Any],
    names: Mapping[int, str],
    restore: Callable[[Any, Tensor | None], Any],
) -> None:
    if _is_of_torch(saved):
        own = optimizer.state_dict()["param_groups"]  # functions in the groups are not in the checkpoint
        saved = _by_number(saved, _names_in(optimizer, names))
        _check_sizes(saved["param_groups"], own)
        groups = [mine | group for mine, group in zip(own, saved["param_groups"], strict=True)]
        held = parameters_of(optimizer)
        state = {
            number: restore(values, held[number] if isinstance(number, int) else None)
            for number, values in saved["state"].items()
        }
        _load_exactly(optimizer, state, groups)
        return
    saved = restore(saved, None)
    optimizer.load_state_dict(saved)
    if not holds_same(saved, optimizer.state_dict()):
        logger.warning(
            f"The state that {type(optimizer).__name__} loaded (`load_state_dict`) differs from the one that it saved "
            "(`state_dict`). The resumed run may differ from an uninterrupted one. Fix these two methods."
        )


def _check_sizes(saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> None:
    """Raise CheckpointError if an optimizer holds another number of parameters than it did when it was saved."""
    before, now = ([len(group["params"]) for group in groups] for groups in (saved, own))
    if before != now:
        raise CheckpointError(
            [
                f"The optimizer has groups of {now} parameters, but had groups of {before} when the checkpoint was "
                "written. The model or a `loss_fn` with parameters has others now. Use the same ones, or start a new "
                "run (`resume=None`)."
            ]
        )


def _load_exactly(optimizer: Optimizer, state: dict[int, Any], groups: list[dict[str, Any]]) -> None:
    """Load a state exactly, with the tensors' types and memory layout.

    `load_state_dict` casts the moments to the weight's type. The moments of a non-contiguous weight must have its
    memory layout, or sums round differently.
    """
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    held = parameters_of(optimizer)
    for index, values in state.items():
        weight, own = held[index], optimizer.state[held[index]]
        for name, value in values.items():
            if isinstance(value, Tensor) and own[name].dtype != value.dtype:
                own[name] = value.to(own[name].device)
            if isinstance(value, Tensor) and value.shape == weight.shape and not weight.is_contiguous():
                own[name] = torch.empty_like(weight, dtype=value.dtype, requires_grad=False).copy_(value)


def _state_of(optimizer: Optimizer, names: Mapping[int, str] | None) -> dict[str, Any]:
    """Return an optimizer's state without functions; if it has torch's form, by the names of the weights, if given."""
    state = _without_functions(optimizer.state_dict())
    if names is None or not _is_of_torch(state):
        return state
    own = _names_in(optimizer, names)
    by_name = {own[key] if isinstance(key, int) else key: values for key, values in state["state"].items()}
    groups = [{**group, "params": [own[number] for number in group["params"]]} for group in state["param_groups"]]
    return {**state, "state": by_name, "param_groups": groups}


def _by_number(saved: dict[str, Any], own: list[str]) -> dict[str, Any]:
    """Return a saved state with the numbers that weights have in this run's optimizer, if it was saved by name."""
    held = [name for group in saved["param_groups"] for name in group["params"]]
    if not any(isinstance(name, str) for name in held):
        return saved
    if other := sorted({*held} ^ {*own}):
        raise ValueError(f"its optimizer trains other weights, such as {other[0]!r}")
    numbers = {name: number for number, name in enumerate(own)}
    state = {numbers.get(key, key): values for key, values in saved["state"].items()}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in saved["param_groups"]]
    return {**saved, "state": state, "param_groups": groups}


def _names_in(optimizer: Optimizer, names: Mapping[int, str]) -> list[str]:
    """Return the names of an optimizer's weights, by number; those without a name are called by their number."""
    return [names.get(id(p), f"#{number}") for number, p in enumerate(parameters_of(optimizer))]


def _without_functions(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state without functions in its parameter groups; they come with the optimizer."""
    if not _is_of_torch(state):
        return state
    groups = [{k: v for k, v in group.items() if not callable(v)} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _is_of_torch(state: Mapping[str, Any]) -> bool:
    return {"state", "param_groups"} <= state.keys()
