"""Check rows before training: all of them, or a sample if there are many or they arrive later."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import DataError
from ..objective.item_counts import Batch
from ..objective.model_forward import is_label
from ..objective.prefixed import length_columns
from .batches import token_positions
from .collator import RowCollator
from .dataset import Rows
from .probe_rows import sample_positions
from .row import Row, length_of
from .value_ranges import ValueRanges


def check_lengths(rows: Rows, max_tokens: int | None, row_collator: RowCollator) -> None:
    """Raise DataError if micro-batches of these rows cannot be kept below a cap on tokens. It names the longest row; in
    a stream, the first one that is too long, when it arrives.

    Args:
        max_tokens: the cap; None if it depends on the rows, so that no row is too long.
    """
    lengths = rows.lengths()
    if lengths is None or not rows.have_tokens:
        raise DataError(
            f"`max_tokens` needs the lengths of the rows, but those of `{rows.argument}` are unknown until they are "
            "computed. Give a `datasets.Dataset` with `input_ids`, or a list; or give `batch_size` instead."
        )
    shortest = min(range(len(rows)), key=lengths.__getitem__)
    batch = row_collator.seeded(rows, [shortest], 0)
    texts = length_columns(map(str, batch)) if isinstance(batch, Mapping) else []
    if len(texts) > 1:
        raise DataError(
            f"`max_tokens` limits the tokens of one text in each row, but `{rows.argument}` has several "
            f"({', '.join(texts)}), each padded to its own longest row. Omit `max_tokens`: `batch_size` then limits "
            "the rows."
        )
    if max_tokens is not None:
        _check_longest(rows, lengths, max_tokens)
    if (n_tokens := token_positions(batch)) > row_collator.width(lengths[shortest]):
        raise DataError(
            "`max_tokens` requires rows that are padded to the longest of their micro-batch, but `data_collator` "
            f"returns {n_tokens} tokens for {rows.name_of(shortest)} of `{rows.argument}` alone, which has "
            f"{lengths[shortest]} tokens. Make it pad to the longest, or give `batch_size` instead."
        )


def check_size_in_tokens(rows: Rows, row_collator: RowCollator, *, decodes: bool) -> None:
    """Raise DataError if rows need memory for more than the token ids in `input_ids`.

    Otherwise, many rows with few tokens could need more memory than a few rows with as many tokens.

    Args:
        decodes: whether the model has a decoder, for which labels are a second sequence.
    """
    lengths = rows.lengths()
    extremes = [] if lengths is None else [f(range(len(rows)), key=lengths.__getitem__) for f in (min, max)]
    for position in dict.fromkeys([0, *extremes]):
        batch = row_collator.seeded(rows, [position], 0)
        columns = _columns_of(batch)
        if fault := _memory_besides_ids(columns, decodes):
            other = " Or set it to a number." if isinstance(columns.get("input_ids"), Tensor) else ""
            raise DataError(
                f"`max_tokens` is 'auto'. In `{rows.argument}`, {fault}, so the number of tokens does not determine "
                f"the memory of a row. Omit `max_tokens`: `batch_size` then limits the rows.{other}"
            )


def _columns_of(batch: Batch) -> Mapping[str, Any]:
    """Return the parts of a batch by name. The first element of a tuple counts as its token ids."""
    if isinstance(batch, Mapping):
        return batch
    return (
        {f"batch[{n}]" if n else "input_ids": part for n, part in enumerate(batch)} if isinstance(batch, tuple) else {}
    )


def _memory_besides_ids(columns: Mapping[str, Any], decodes: bool) -> str:
    """Return the reason why a batch of one row needs memory for more than its `input_ids`, or an empty string.

    Columns of one number or one vector of floats per row, such as classes and targets of a regression, need little.
    """
    ids = columns.get("input_ids")
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        return "there are no token ids (`input_ids`)"
    if ids.ndim != 2:
        return f"`input_ids` has {ids.ndim - 1} dimensions in each row, not one"
    for name, value in columns.items():
        if not isinstance(value, Tensor) or value.ndim < 2 or (value.ndim == 2 and value.is_floating_point()):
            continue
        if decodes and is_label(name):
            return f"`{name}` is a second sequence, for the decoder"
        if value.shape[:2] != ids.shape:
            return f"`{name}` has the shape {tuple(value.shape)} but `input_ids` has {tuple(ids.shape)}"
    return ""


def _check_longest(rows: Rows, lengths: list[int], max_tokens: int) -> None:
    longest = max(range(len(rows)), key=lengths.__getitem__)
    _refuse_longer(rows, longest, lengths[longest], max_tokens)

    def refuse_longer(more: list[Row], first: int) -> list[Row]:
        for position, row in enumerate(more, first):
            _refuse_longer(rows, position, length_of(row), max_tokens)
        return more

    rows.on_arrival(refuse_longer)


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
