"""Passes as in training, but for what they draw at random."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .side_effects import Buffers, Generators, buffers_of, in_mode, preserved_buffers, preserved_rng

_DROPOUTS = {
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.dropout_, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout),
}
_ATTENTION = {F.scaled_dot_product_attention: 4, F.multi_head_attention_forward: 10}  # where the rate of dropout stands


class _WithoutDropout(TorchFunctionMode):
    """Turns dropout off in torch's own functions, whoever calls them and with whatever rate."""

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
def _also_in_what_is_run_again(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing runs parts of the forward pass again in the backward pass, inside of which no mode is on:
    it is told to put this one on."""
    name = "_gradient_checkpointing_func"  # Transformers', a partial of torch's
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
def rehearsed(model: nn.Module, run: Callable[[], object]) -> Iterator[list[str]]:
    """Around passes whose outputs are those of training, and the same each time: train mode, without dropout.

    Where train mode draws at random in other ways (layers left out, spectrograms masked), it is eval mode, but for
    the modules that move a buffer of their own in train mode: those take in the rows of a batch together, as batch norm
    does. Generators, buffers and modes are afterwards as they were.

    Args:
        run: one pass of the model, to see what it moves.

    Yields:
        The names of the modules that move buffers.
    """
    with (
        preserved_rng(),
        preserved_buffers(model),
        in_mode(model, training=True),
        _also_in_what_is_run_again(model),
        _WithoutDropout(),
    ):
        generators, buffers = Generators.now(), Buffers.now(buffers_of(model))
        run()
        moving = {module for module, name in buffers.kept if buffers.moved(module, name)}
        if not generators.unmoved():
            model.eval()
            for module in moving:
                module.training = True
        yield [name for name, module in model.named_modules() if module in moving]
