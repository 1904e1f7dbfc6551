"""What can be wrong with rows, found before the model sees them: in a sample first, later in each batch."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import DataError
from ..objective.item_counts import Batch, ItemCounter, targets_of
from ..objective.self_check import Sample
from .collator import RowCollator, can_be_taken_apart, take
from .dataset import Row, Rows, class_of, length_of
from .iterable import StreamRows

_SAMPLE, _PROBE_ROWS = 32, 4
_LONG_ENOUGH = 64  # tokens, for rows to be unlike in length, or twice the shortest
_STRIDE = 4
_SHORTEST = 8  # rows to look at, so that some are short enough


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
    if isinstance(rows, StreamRows):

        def refuse_longer(more: list[Row], first: int) -> list[Row]:
            for position, row in enumerate(more, first):
                _refuse_longer(rows, position, length_of(row), max_tokens)
            return more

        rows.then(refuse_longer)
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


def sample_positions(rows: Rows) -> list[int]:
    """Up to 32 positions, in ascending order: at random, since rows may repeat with a period, but always the same."""
    return sorted(np.random.RandomState(0).permutation(len(rows))[:_SAMPLE].tolist())


def check_sample(rows: Rows, row_collator: RowCollator, ranges: ValueRanges) -> Batch:
    """Collates a sample of rows, looks at their numbers, and returns the batch.

    Raises:
        DataError: naming the first row at fault.
    """
    positions = sample_positions(rows)
    batch = row_collator.seeded(rows, positions, 0)
    ranges.check(batch, rows, positions)
    return batch


def labelled_positions(rows: Rows, row_collator: RowCollator, ignore_index: int) -> list[int]:
    """Positions of rows with at least one label that counts: those of the sample, a few shortest and the longest row;
    where none of these has one, the first such row. A collator that draws may give any row a label.

    Raises:
        DataError: where no row has one.
    """
    positions = sorted({*sample_positions(rows), *_extremes(rows)})
    if row_collator.draws:
        return positions
    item_counter = ItemCounter(ignore_index)
    found = [p for p in positions if _has_items(row_collator(rows, [p]), item_counter)]
    if found:
        return found
    for position in range(len(rows)):
        if _has_items(row_collator(rows, [position]), item_counter):
            return [position]
    raise DataError(
        f"{rows.describe_all} has no label that counts: all are {ignore_index}, which the loss leaves out. Check how "
        f"the labels were made, and that truncation leaves some.{rows.if_none_is_fit}"
    )


def _extremes(rows: Rows) -> list[int]:
    lengths = rows.lengths()
    if lengths is None:
        return []
    everyone = range(len(rows))
    shortest = heapq.nsmallest(_SHORTEST, everyone, key=lengths.__getitem__)
    return [*shortest, max(everyone, key=lengths.__getitem__)]


def sample_of(rows: Rows, row_collator: RowCollator, candidates: Sequence[int]) -> Sample:
    """A few labelled rows, together and apart, for the objective to measure its loss on.

    Raises:
        DataError: where the collator draws at random and its batches cannot be taken apart: then what a row
            contributes depends on the batch it is in.
    """
    positions, longest = _unlike(rows, candidates)

    def batch_of(chosen: Sequence[int]) -> Batch:
        return row_collator.seeded(rows, chosen, 0)  # rows that draw are to be the same rows each time

    together = batch_of(positions)
    in_rows = can_be_taken_apart(together, len(positions))
    if row_collator.draws and not in_rows:
        raise DataError(
            "`data_collator` draws at random, and gives batches whose tensors do not have the rows along their first "
            "dimension, so that no window can be drawn once and then cut. Give one tensor row for each row."
        )
    return Sample(
        batch_of([longest]),
        together,
        (lambda batch, groups: [take(batch, group) for group in groups]) if in_rows else None,
        None if row_collator.draws else lambda groups: [batch_of([positions[n] for n in g]) for g in groups],
        [rows.name_of(position) for position in positions],
    )


def _unlike(rows: Rows, candidates: Sequence[int]) -> tuple[list[int], int]:
    """The rows to measure a loss on, and the longest of all.

    The shortest, the longest that takes no time, and two between, of other classes, and of lengths that leave another
    rest when divided by 4: the more the groups differ, the more is told. (A model that takes tokens four by four may
    mind padding only where four are not whole.)
    """
    fetched = dict(zip(candidates, rows.fetch(candidates), strict=True))
    by_length = sorted(candidates, key=lambda position: length_of(fetched[position]))
    longest = by_length[-1]
    quick = max(_LONG_ENOUGH, 2 * length_of(fetched[by_length[0]]))
    n_quick = sum(length_of(fetched[p]) <= quick for p in by_length)
    by_length = by_length[: max(n_quick, _PROBE_ROWS)]
    n = min(_PROBE_ROWS, len(by_length))
    chosen = [by_length[i * (len(by_length) - 1) // max(1, n - 1)] for i in range(n)]
    kinds = {p: (class_of(fetched[p]), length_of(fetched[p]) % _STRIDE) for p in by_length}
    for place in range(1, n - 1):
        others = [kinds[p] for i, p in enumerate(chosen) if i != place]
        classes, rests = {kind for kind, _ in others}, {rest for _, rest in others}
        chosen[place] = min(by_length, key=lambda p: (kinds[p][0] in classes, kinds[p][1] in rests, p != chosen[place]))
    # With other labels, a row and its copies can still tell something.
    return (chosen * _PROBE_ROWS)[:_PROBE_ROWS], longest


def _has_items(batch: Batch, item_counter: ItemCounter) -> bool:
    count = item_counter.applicable(batch).get("labels")
    return count is None or bool(count(batch))
