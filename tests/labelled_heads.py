"""Record how many positions a language model's head sees in training, and why ftaccum gives it all of them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ftaccum.runtime.log import logger
from training_passes import is_training_pass

_MESSAGE = "Logits are computed at "


def record_positions(model: Any) -> list[int]:
    """Return a list to which each training pass adds the number of positions that the output embedding sees."""
    head, seen = model.get_output_embeddings(), []

    class Recording(type(head)):
        def forward(self, hidden: Tensor) -> Tensor:
            if is_training_pass():
                seen.append(hidden.shape[:-1].numel())
            return super().forward(hidden)

    head.__class__ = Recording
    return seen


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


@contextmanager
def choices_of_head() -> Iterator[list[str]]:
    """Collect the messages of runs with `loss_head="auto"` about the positions of their logits.

    They must have `verbosity="debug"`.
    """
    messages, choices = _Messages(), []
    logger.addHandler(messages)
    try:
        yield choices
    finally:
        logger.removeHandler(messages)
        found = [each.removeprefix(_MESSAGE) for each in messages.found if each.startswith(_MESSAGE)]
        choices += [each for each in found if "`loss_head`" not in each]


class WithLoss(nn.Module):
    """Mixed into a model's class: computes its loss from the outputs of the model without labels."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        if labels is not None:
            outputs.loss = self.loss_of(outputs.logits, labels)
        return outputs
