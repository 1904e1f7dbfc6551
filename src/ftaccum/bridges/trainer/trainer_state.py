"""The state of a Trainer that passes change besides the model's, restored after passes that are none of its own."""

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from torch import nn

from ...runtime.module_attributes import preserve_object
from ...runtime.own_generators import preserve_own_generators
from ...runtime.state_guards import preserve_buffers
from ...runtime.temporary_attribute import temporary_attribute
from ...runtime.watched_state import names_in

_LIBRARIES = {"transformers", "trl"}  # whose methods count steps and keep metrics
# Attributes of a Trainer that `compute_loss` only reads, or that are restored elsewhere.
_OF_EVERY_TRAINER = {
    "accelerator", "args", "callback_handler", "control", "data_collator", "eval_dataset", "log", "lr_scheduler",
    "model", "model_wrapped", "optimizer", "processing_class", "state", "train_dataset",
}  # fmt: skip


def state_of(trainer: Any, names: Collection[str]) -> dict[str, Any]:
    """Return the functions and values that compute a Trainer's loss, by name.

    Args:
        names: the names that its own methods read.
    """
    read = {"compute_loss_func", "label_smoother", *names} - _OF_EVERY_TRAINER
    return {name: value for name, value in vars(trainer).items() if name in read}


def names_read_by(compute_loss: Any, trainer: Any) -> set[str]:
    """Return the names in `compute_loss` of a subclass, and in the methods of the trainer that it calls."""
    found: set[str] = set()
    ahead = [getattr(compute_loss, "__func__", compute_loss)]
    while ahead:
        function = ahead.pop()
        if isinstance(function, FunctionType) and function.__module__.split(".")[0] not in _LIBRARIES:
            new = names_in(function.__code__) - found
            found |= new
            ahead += [inspect.getattr_static(type(trainer), name, None) for name in new]
    return found


@contextmanager
def preserved(trainer: Any) -> Iterator[None]:
    """Restore what `compute_loss` may change besides the model on exit: metrics and generators that the trainer keeps,
    and buffers of other modules. Silence its `log`."""
    modules = [value for value in vars(trainer).values() if isinstance(value, nn.Module)]
    with (
        temporary_attribute(trainer, "log", lambda *_, **__: None),
        preserve_object(trainer, _OF_EVERY_TRAINER),
        preserve_own_generators(trainer, trainer.train_dataset, trainer.data_collator),
        preserve_buffers(*modules),
    ):
        yield
