"""Forward passes as in training, but without random draws."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..runtime.module_attributes import ModuleAttributes, preserve_attributes
from ..runtime.state_guards import Buffers, Generators, preserve_buffers, preserve_rng, training_mode
from .probe import relative

_DROPOUTS = {
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.dropout_, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout),
}
_ATTENTION = {F.scaled_dot_product_attention: 4, F.multi_head_attention_forward: 10}  # the position of the dropout rate


class _WithoutDropout(TorchFunctionMode):
    """A mode that turns off dropout in torch's own functions, for any caller and at any rate."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if function in _ATTENTION:
            place = _ATTENTION[function]
            args = (*args[:place], 0.0, *args[place + 1 :]) if len(args) > place else args
            kwargs = {**kwargs, "dropout_p": 0.0} if "dropout_p" in kwargs else kwargs
        return function(*args, **kwargs)


@contextmanager
def _without_dropout_in_checkpoints(model: nn.Module) -> Iterator[None]:
    """Turn off dropout in the parts of the forward pass that gradient checkpointing runs again.

    It runs them in the backward pass, where no torch function mode is active, so it has to enter this one itself.
    """
    name = "_gradient_checkpointing_func"  # set by Transformers; a partial of torch's function
    found = [(module, vars(module)[name]) for module in model.modules() if name in vars(module)]
    for module, run_again in found:
        again = partial(run_again, use_reentrant=False, context_fn=lambda: (nullcontext(), _WithoutDropout()))
        setattr(module, name, again)
    try:
        yield
    finally:
        for module, run_again in found:
            setattr(module, name, run_again)


@contextmanager
def _without_rates(model: nn.Module) -> Iterator[None]:
    """Hold the rate of dropout modules at 0, also when other checkpointing code runs them again."""
    found = [(module, module.p) for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    for module, _ in found:
        module.p = 0.0
    try:
        yield
    finally:
        for module, rate in found:
            module.p = rate


@dataclass(frozen=True)
class DeterministicMode:
    """A way to run a model as in training, with the same outputs each time: in train mode, without dropout.

    If train mode draws at random in other ways (skipped layers, masked spectrograms), the model runs in eval mode,
    except for the modules that move a buffer of their own in train mode: like batch norm, they compute with all rows of
    a batch. If such a module draws as well, all modules stay in eval mode.

    Attributes:
        whole: whether all modules are in train mode.
        moving: the modules that move buffers, by name.
        modules: the modules that compute the loss, besides the model. They keep their mode; their buffers are restored.
    """

    model: nn.Module
    whole: bool
    moving: Mapping[str, nn.Module]
    modules: Sequence[nn.Module] = ()

    @classmethod
    def of(
        cls, model: nn.Module, run: Callable[[], Sequence[float]], modules: Sequence[nn.Module] = ()
    ) -> "DeterministicMode":
        """Find the mode for a model in two passes, or up to four if train mode draws.

        Args:
            run: runs one pass of the model, and returns its losses.
            modules: the modules that compute the loss, besides the model.
        """
        whole = cls(model, True, {}, modules)
        repeats, moved = whole._tried(run)
        whole = whole._with_moving(moved)
        return whole if repeats else whole._without_draws(run)

    @classmethod
    def of_pair(
        cls, model: nn.Module, run: Callable[[], Mapping[str, float]], modules: Sequence[nn.Module], tolerance: float
    ) -> "tuple[DeterministicMode | None, bool]":
        """Find the mode, and whether a pass leaves state behind that the next one depends on, in the same two passes.

        Generators and buffers are restored between the two passes, but nothing else that a pass may change.

        Args:
            run: runs one pass of the model, and returns its losses by term.
            tolerance: the largest difference that counts as rounding.

        Returns:
            The mode; None if the two passes differ, so that they do not show it. And whether they agree.
        """
        whole = cls(model, True, {}, modules)
        attributes = ModuleAttributes(model, *modules)
        with whole.passes():
            try:
                with preserve_rng(), preserve_buffers(model, *modules):
                    generators, buffers = Generators.now(), Buffers.of(model, *modules)
                    first = run()
                    draws, moved = not generators.unchanged(), buffers.all_moved()
                with preserve_rng(), preserve_buffers(model, *modules):
                    second = run()
            finally:
                attributes.restore()
        if difference_of_passes(first, second) > tolerance or not _repeat(list(first.values()), list(second.values())):
            return None, difference_of_passes(first, second) <= tolerance
        whole = whole._with_moving(moved)

        def run_once() -> list[float]:
            with preserve_attributes(model, *modules):
                return list(run().values())

        return whole._without_draws(run_once) if draws else whole, True

    @property
    def names_of_moving(self) -> list[str]:
        """The classes and the names of the modules that move buffers, for people."""
        return [f"{type(module).__name__} {name!r}" for name, module in self.moving.items()]

    def _with_moving(self, moved: set[nn.Module]) -> "DeterministicMode":
        return replace(self, moving={name: module for name, module in self.named_modules().items() if module in moved})

    def _without_draws(self, run: Callable[[], Sequence[float]]) -> "DeterministicMode":
        """Return the mode for a model that draws in train mode."""
        partly = replace(self, whole=False)
        return partly if partly._tried(run)[0] else replace(partly, moving={})

    def named_modules(self) -> dict[str, nn.Module]:
        """Return all modules by name, including those of the loss."""
        seen: set[nn.Module] = set()
        found = dict(self.model.named_modules(seen))
        for module in self.modules:
            found |= dict(module.named_modules(seen, "loss_fn"))
        return found

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Hold this mode for passes, and restore generators, buffers and modes afterwards."""
        with (
            preserve_rng(),
            preserve_buffers(self.model, *self.modules),
            training_mode(self.model, training=self.whole),
            _without_dropout_in_checkpoints(self.model),
            _without_rates(self.model),
            _WithoutDropout(),
        ):
            for module in () if self.whole else self.model.modules():
                module.training = module in self.moving.values()
            yield

    def _tried(self, run: Callable[[], Sequence[float]]) -> tuple[bool, set[nn.Module]]:
        """Return whether a pass can be repeated, and the modules whose buffers it moves."""
        with self.passes():
            generators, buffers = Generators.now(), Buffers.of(self.model, *self.modules)
            first = run()
            moved = buffers.all_moved()
            buffers.restore()
            repeats = generators.unchanged() and _repeat(first, run())
        return repeats, moved


def difference_of_passes(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Return the largest relative difference in loss between two passes over the same rows."""
    return max((relative(other[term], loss) for term, loss in one.items() if loss == loss), default=0.0)


def _repeat(first: Sequence[float], second: Sequence[float]) -> bool:
    return len(first) == len(second) and np.allclose(second, first, rtol=1e-6, equal_nan=True)
