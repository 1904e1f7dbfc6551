"""The state of a Trainer that passes change besides the model's, restored after passes that are none of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ...runtime.module_attributes import preserve_object
from ...runtime.own_generators import preserve_own_generators
from ...runtime.state_guards import preserve_buffers
from ...runtime.temporary_attribute import temporary_attribute

# Attributes of a Trainer that `compute_loss` only reads, or that are restored elsewhere.
_OF_EVERY_TRAINER = {
    "accelerator", "args", "callback_handler", "control", "data_collator", "eval_dataset", "log", "lr_scheduler",
    "model", "model_wrapped", "optimizer", "processing_class", "state", "train_dataset",
}  # fmt: skip


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
