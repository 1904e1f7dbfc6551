"""Optimizers that contain other optimizers, and optimizers that evaluate other weights than they train."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, SparseAdam


def inner_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimizers that an optimizer contains at any depth, in attributes or in lists and dicts there."""
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


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters in all groups of an optimizer, in the order in which torch's `state_dict` numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def takes_sparse_gradients(optimizer: Optimizer) -> set[Tensor]:
    """Return the parameters whose sparse gradients an optimizer must get as they are.

    SparseAdam takes no dense ones, and a user's own optimizer may update only the rows in a sparse gradient. In all
    other optimizers of torch and Transformers, a dense gradient gives the same update, if they take a sparse one.
    """
    every = (optimizer, *inner_optimizers(optimizer))
    stepping = {p: each for each in every for p in parameters_of(each)}  # of the innermost
    return {p for p, each in stepping.items() if isinstance(each, SparseAdam) or not _is_known(each)}


def _is_known(optimizer: Optimizer) -> bool:
    modules = [kind.__module__ for kind in type(optimizer).__mro__ if kind is not Optimizer]
    return any(module.startswith(("torch.optim.", "transformers.")) for module in modules)


@contextmanager
def keep_groups(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Keep the parameter groups the same objects while states are loaded.

    `load_state_dict` creates new groups. An optimizer shares its groups with those that it contains, so a schedule
    would afterwards write its rates to groups that no step reads.
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
    """Move the state of an optimizer, and of those that it contains, to the devices of the weights."""
    for each in (optimizer, *inner_optimizers(optimizer)):
        for group in each.param_groups:
            on_device = group.get("capturable") or group.get("fused")
            for p in group["params"]:
                state = getattr(each, "state", {}).get(p, {})
                moving = {k: v for k, v in state.items() if isinstance(v, Tensor) and (k != "step" or on_device)}
                state.update({name: value.to(p.device) for name, value in moving.items()})


@contextmanager
def training_weights(optimizer: Optimizer) -> Iterator[None]:
    """Hold an optimizer that has train and eval modes in train mode, and leave it in eval mode.

    A schedule-free optimizer computes gradients at one point and averages others. The average is evaluated and saved.
    The weights hold either, depending on the mode.
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
    """Hold the weights in their state to evaluate and save, and restore the training weights bit for bit on exit.

    Switching to eval mode and back rounds, so a run would depend on how often it is saved. So the weights are copied.
    """
    switched = _with_modes(optimizer)
    weights = parameters_of(optimizer) if switched else []
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
    """Return the optimizer if it has train and eval modes, else those inside it that have them."""
    return [optimizer] if _has_modes(optimizer) else [each for each in inner_optimizers(optimizer) if _has_modes(each)]


def _has_modes(optimizer: Optimizer) -> bool:
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


class OptimizerBackup:
    """A copy of everything that an optimizer step changes: weights, state and the values in parameter groups."""

    def __init__(self, optimizer: Optimizer) -> None:
        every = (optimizer, *inner_optimizers(optimizer))
        self._groups = [(group, dict(group)) for each in every for group in each.param_groups]
        weights = dict.fromkeys(p for group, _ in self._groups for p in group["params"])
        self._weights = {p: p.detach().clone() for p in weights}
        states = [each.state for each in every if hasattr(each, "state")]
        self._states = [(state, {key: copy.deepcopy(values) for key, values in state.items()}) for state in states]

    def restore(self) -> None:
        """Restore everything."""
        with torch.no_grad():
            for p, values in self._weights.items():
                p.copy_(values)
        kept: list[tuple[dict[Any, Any], dict[Any, Any]]] = [*self._groups, *self._states]
        for held, before in kept:
            held.clear()
            held.update(before)
