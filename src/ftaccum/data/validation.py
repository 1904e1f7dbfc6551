"""What can be wrong with rows, found before the model sees them: in a sample first, later in each batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import DataError
from ..objective.item_counts import Batch, targets_of
from .collator import RowCollator
from .dataset import Rows
from .probe_rows import sample_positions
from .row import Row, length_of


@dataclass(frozen=True)
class ValueRanges:
    """What the numbers in a batch may be.

    Attributes:
        vocabulary: token ids are below this; None where unknown.
        n_classes: labels are below this, or the ignored one; None where labels are no class numbers.
        ignore_index: the label that is left out of the loss.
    """

    vocabulary: int | None = None
    n_classes: int | None = None
    ignore_index: int = -100

    @classmethod
    def of_tokens(cls, model: Any) -> "ValueRanges":
        """The range of token ids alone, from the model's input embeddings."""
        try:
            embeddings = model.get_input_embeddings()
        except (AttributeError, NotImplementedError):  # a plain module; a model of images
            embeddings = None
        return cls(vocabulary=getattr(embeddings, "num_embeddings", None))

    def with_classes(self, n_classes: int | None, ignore_index: int) -> "ValueRanges":
        return ValueRanges(self.vocabulary, n_classes, ignore_index)

    def check(self, batch: Batch, rows: Rows, positions: Sequence[int]) -> None:
        """Raises DataError naming the first row with a number out of range. (On a GPU the model's own complaint
        would name nothing, and leave the device unusable.)"""
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if self.vocabulary is not None and isinstance(ids, Tensor):
            self._refuse(
                (ids < 0) | (ids >= self.vocabulary), ids, batch, rows, positions,
                f"token id {{}}, but the model's vocabulary is 0 to {self.vocabulary - 1}. "
                "Tokenise with the model's own tokenizer, or resize its embeddings.",
            )  # fmt: skip
        labels = targets_of(batch)
        if self.n_classes is not None and labels is not None:
            outside = ((labels < 0) | (labels >= self.n_classes)) & (labels != self.ignore_index)
            self._refuse(
                outside, labels, batch, rows, positions,
                f"label {{}}, but the model tells {self.n_classes} classes apart, 0 to {self.n_classes - 1}. "
                f"Load the model with `num_labels` to fit, or mend the label ({self.ignore_index} is ignored).",
            )  # fmt: skip

    @staticmethod
    def _refuse(
        outside: Tensor, values: Tensor, batch: Batch, rows: Rows, positions: Sequence[int], words: str
    ) -> None:
        if outside.any():
            first = outside.nonzero()[0]
            row, value = int(first[0]), int(values[tuple(first)])
            if len(outside) == 1 < len(positions) and isinstance(batch, Mapping) and "position_ids" in batch:
                # Rows lie one behind the other, and each begins with position 0.
                row = int((batch["position_ids"][0, : first[1] + 1] == 0).sum()) - 1
            name = rows.name_of(positions[row]) if row < len(positions) else f"one of {rows.names_of(positions)}"
            raise DataError(f"Of `{rows.argument}`, {name} has the {words.format(value)}")


def check_lengths(rows: Rows, max_tokens: int, row_collator: RowCollator) -> None:
    """Raises DataError where rows cannot be kept under a cap on tokens, naming the longest; of a stream, when it
    comes."""
    lengths = rows.lengths()
    if lengths is None or not rows.have_tokens:
        raise DataError(
            f"`max_tokens` needs the lengths of the rows, and those of `{rows.argument}` are not known before they are "
            "made. Give a `datasets.Dataset` with `input_ids`, or a list; or cut by rows (`batch_size`)."
        )
    longest = max(range(len(rows)), key=lengths.__getitem__)
    _refuse_longer(rows, longest, lengths[longest], max_tokens)

    def refuse_longer(more: list[Row], first: int) -> list[Row]:
        for position, row in enumerate(more, first):
            _refuse_longer(rows, position, length_of(row), max_tokens)
        return more

    rows.on_arrival(refuse_longer)
    shortest = min(range(len(rows)), key=lengths.__getitem__)
    batch = row_collator.seeded(rows, [shortest], 0)
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if isinstance(ids, Tensor) and ids.numel() > row_collator.width(lengths[shortest]):
        raise DataError(
            "`max_tokens` counts on rows that are padded to the longest of their micro-batch, but `data_collator` "
            f"makes {ids.numel()} tokens of {rows.name_of(shortest)} of `{rows.argument}`, which has "
            f"{lengths[shortest]}. Have it pad to the longest, or cut by rows (`batch_size`)."
        )


def _refuse_longer(rows: Rows, position: int, length: int, max_tokens: int) -> None:
    if length > max_tokens:
        raise DataError(
            f"Of `{rows.argument}`, {rows.name_of(position)} has {length} tokens, and `max_tokens` is {max_tokens}: "
            f"no micro-batch could hold it. Give at least {length}, or truncate the rows."
        )


def check_sample(rows: Rows, row_collator: RowCollator, ranges: ValueRanges) -> Batch:
    """Collates a sample of rows, looks at their numbers, and returns the batch.

    Raises:
        DataError: naming the first row at fault.
    """
    positions = sample_positions(rows)
    batch = row_collator.seeded(rows, positions, 0)
    ranges.check(batch, rows, positions)
    return batch
