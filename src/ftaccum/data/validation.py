"""What can be wrong with rows, found before training, in a sample where they are too many or come later."""

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
