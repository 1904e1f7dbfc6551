"""Optimizers that hold other optimizers, and optimizers that evaluate other weights than they train."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer, SparseAdam


def inner_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimizers that an optimizer holds (in attributes, or in lists and dicts there), at any depth."""
    found: list[Optimizer] = []
    waiting: list[Any] = [*vars(optimizer).values()]
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, Optimizer) and value is not optimizer and value not in found:
            found.append(value)
            waiting += vars(value).values()
        elif isinstance(value, list | tuple):
            waiting += [each for each in value if isinstance(each, Optimizer)]
        elif isinstance(value, Mapping):
            waiting += [each for each in value.values() if isinstance(each, Optimizer)]
    return found


def takes_sparse_gradients(optimizer: Optimizer) -> set[Tensor]:
    """Return the parameters of which an optimizer gets sparse gradients as they are.

    SparseAdam takes no others, and optimizers that users write may move only the rows that are in one. For the rest of
    torch's and Transformers' a dense gradient does the same, where they take a sparse one at all.
    """
    every = (optimizer, *inner_optimizers(optimizer))
    stepping = {p: each for each in every for group in each.param_groups for p in group["params"]}  # the innermost
    return {p for p, each in stepping.items() if isinstance(each, SparseAdam) or not _is_known(each)}


def _is_known(optimizer: Optimizer) -> bool:
    modules = [kind.__module__ for kind in type(optimizer).__mro__ if kind is not Optimizer]
    return any(module.startswith(("torch.optim.", "transformers.")) for module in modules)


@contextmanager
def keep_groups(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Keep the parameter groups the same objects while states are loaded.

    `load_state_dict` makes new groups. An optimizer and those that it holds share theirs: afterwards a schedule would
    write its rates where no step reads them.
    """
    before = [(optimizer, list(optimizer.param_groups)) for optimizer in optimizers]
    yield
    for optimizer, groups in before:
        for group, loaded in zip(groups, optimizer.param_groups, strict=True):
            if group is not loaded:
                values = dict(loaded)
                group.clear()
                group.update(values)
        optimizer.param_groups[:] = groups


def place_state(optimizer: Optimizer) -> None:
    """Move the state of an optimizer that has taken steps, and of those that it holds, to where the weights are."""
    for each in (optimizer, *inner_optimizers(optimizer)):
        for group in each.param_groups:
            on_device = group.get("capturable") or group.get("fused")
            for p in group["params"]:
                state = getattr(each, "state", {}).get(p, {})
                moving = {k: v for k, v in state.items() if isinstance(v, Tensor) and (k != "step" or on_device)}
                state.update({name: value.to(p.device) for name, value in moving.items()})


@contextmanager
def training_weights(optimizer: Optimizer) -> Iterator[None]:
    """Have an optimizer with a train and an eval mode be in train mode, and leave it in eval mode.

    Schedule-free optimizers take gradients at one point and average the others: the average is what is evaluated and
    saved, and the weights hold one or the other.
    """
    for each in _with_modes(optimizer):
        each.train()
    try:
        yield
    finally:
        for each in _with_modes(optimizer):
            each.eval()


@contextmanager
def evaluation_weights(optimizer: Optimizer) -> Iterator[None]:
    """Have the weights be those to evaluate and save, and then again those to train, to the last bit.

    Going to eval mode and back rounds: a run would depend on how often it is saved. So the weights are copied.
    """
    switched = _with_modes(optimizer)
    weights = [p for group in optimizer.param_groups for p in group["params"]] if switched else []
    trained = [p.detach().clone() for p in weights]
    for each in switched:
        each.eval()
    try:
        yield
    finally:
        for each in switched:
            each.train()
        with torch.no_grad():
            for p, values in zip(weights, trained, strict=True):
                p.copy_(values)


def switches_weights(optimizer: Optimizer) -> bool:
    """Return whether an optimizer evaluates other weights than it trains."""
    return bool(_with_modes(optimizer))


def _with_modes(optimizer: Optimizer) -> list[Any]:
    """Return the optimizer if it has modes, else those that it holds and that have."""
    return [optimizer] if _has_modes(optimizer) else [each for each in inner_optimizers(optimizer) if _has_modes(each)]


def _has_modes(optimizer: Optimizer) -> bool:
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


class OptimizerBackup:
    """A copy of what an optimizer changes in a step: weights, state and the numbers of its groups."""

    def __init__(self, optimizer: Optimizer) -> None:
        every = (optimizer, *inner_optimizers(optimizer))
        self._groups = [(group, dict(group)) for each in every for group in each.param_groups]
        weights = dict.fromkeys(p for group, _ in self._groups for p in group["params"])
        self._weights = {p: p.detach().clone() for p in weights}
        states = [each.state for each in every if hasattr(each, "state")]
        self._states = [(state, {key: copy.deepcopy(values) for key, values in state.items()}) for state in states]

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for p, values in self._weights.items():
                p.copy_(values)
        kept: list[tuple[dict[Any, Any], dict[Any, Any]]] = [*self._groups, *self._states]
        for held, before in kept:
            held.clear()
            held.update(before)
