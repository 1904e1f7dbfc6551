"""Check rows before training: all of them, or a sample if there are many or they arrive later."""

from collections.abc import Mapping

from torch import Tensor

from ..errors import DataError
from ..objective.item_counts import Batch
from .collator import RowCollator
from .dataset import Rows
from .probe_rows import sample_positions
from .row import Row, length_of
from .value_ranges import ValueRanges


def check_lengths(rows: Rows, max_tokens: int, row_collator: RowCollator) -> None:
    """Raise DataError if micro-batches of these rows cannot be kept below a cap on tokens. It names the longest row; in
    a stream, the first one that is too long, when it arrives."""
    lengths = rows.lengths()
    if lengths is None or not rows.have_tokens:
        raise DataError(
            f"`max_tokens` needs the lengths of the rows, but those of `{rows.argument}` are unknown until they are "
            "computed. Give a `datasets.Dataset` with `input_ids`, or a list; or give `batch_size` instead."
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
            "`max_tokens` requires rows that are padded to the longest of their micro-batch, but `data_collator` "
            f"returns {ids.numel()} tokens for {rows.name_of(shortest)} of `{rows.argument}` alone, which has "
            f"{lengths[shortest]} tokens. Make it pad to the longest, or give `batch_size` instead."
        )


def _refuse_longer(rows: Rows, position: int, length: int, max_tokens: int) -> None:
    if length > max_tokens:
        raise DataError(
            f"In `{rows.argument}`, {rows.name_of(position)} has {length} tokens, but `max_tokens` is {max_tokens}: "
            f"no micro-batch can hold it. Set `max_tokens` to at least {length}, or truncate the rows."
        )


def check_sample(rows: Rows, row_collator: RowCollator, ranges: ValueRanges) -> Batch:
    """Collate a sample of rows, check their numbers, and return the batch.

    Raises:
        DataError: if a row cannot be collated, or has a number out of range. It names the first such row.
    """
    positions = sample_positions(rows)
    batch = row_collator.seeded(rows, positions, 0)
    ranges.check(batch, rows, positions)
    return batch
