"""The choice of rows to measure a loss on, from batches that are collated already."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from accelerate.utils import send_to_device
from torch import Tensor

from ..data.batches import as_mapping, can_be_taken_apart, in_form_of, join, take, trimmed
from ..data.column_fills import columns_of, is_along
from ..data.probe_rows import unlike_places
from ..errors import DataError
from ..objective.item_counts import Batch, ItemCounter, rows_of, targets_of
from ..objective.sample import Groups, Sample
from ..runtime.process_group import ProcessGroup

_MOST_ROWS = 256  # to choose from, in each process


@dataclass(frozen=True)
class CollatedRow:
    """One row of a collated batch.

    Attributes:
        batch: the row as a batch of its own, on the host.
        name: how messages name the row.
        length: its number of tokens; 1 if it has none.
        kind: its class; None if it has none.
    """

    batch: Batch
    name: str
    length: int
    kind: int | None


def sample_of_window(
    batches: Sequence[Batch], item_counter: ItemCounter, pad_token_id: int, process_group: ProcessGroup
) -> Sample | None:
    """Return up to four unlike rows of a window on all processes, for the objective to measure its loss on.

    These are the shortest row with a label that counts, the longest, and two in between with other classes. All
    processes call this, and get the same rows.

    Args:
        batches: this process's batches of the window.

    Returns:
        The sample; None if no row has a label that counts.

    Raises:
        DataError: on all processes, if the batches of one of them cannot be split into rows.
    """
    own = process_group.run_on_all(lambda: unlike_rows(batches, item_counter))
    everyone = process_group.gather(own)
    if not process_group.is_single:
        everyone = [
            [replace(row, name=f"{row.name} of process {rank}") for row in rows] for rank, rows in enumerate(everyone)
        ]
    return sample_of_rows(list(chain.from_iterable(everyone)), item_counter.ignore_index, pad_token_id)


def unlike_rows(batches: Sequence[Batch], item_counter: ItemCounter) -> list[CollatedRow]:
    """Return up to four unlike rows with labels that count.

    Raises:
        DataError: if the batches cannot be split into rows.
    """
    rows: list[CollatedRow] = []
    for n, batch in enumerate(batches):
        if len(rows) >= _MOST_ROWS:
            break
        if not can_be_taken_apart(batch, rows_of(batch)):
            raise DataError(
                "The batches cannot be split into rows, which is needed to measure how the loss is counted: some of "
                "their values are not tensors with one row for each row of the batch. Make the first dimension of "
                "every tensor the rows."
            )
        on_host = send_to_device(batch, "cpu")
        rows += [
            CollatedRow(row, f"row {place} of micro-batch {n}", _length(row), _kind(row))
            for place in range(rows_of(batch))
            if item_counter.has_items(row := take(on_host, [place]))
        ]
    return _unlike(rows) if rows else []


def sample_of_rows(rows: Sequence[CollatedRow], ignore_index: int, pad_token_id: int) -> Sample | None:
    """Return a sample of up to four of these rows; None if there are no rows.

    Rows that have other columns or shapes than the longest one are left out.
    """
    longest = max(rows, key=lambda row: row.length, default=None)
    if longest is None:
        return None
    own_form = longest.batch
    if not isinstance(own_form, Mapping) and _shows_padding(rows, pad_token_id):
        rows = [replace(row, batch=as_mapping(row.batch)) for row in rows]
        longest = replace(longest, batch=as_mapping(longest.batch))
    unknown = dict.fromkeys(columns_of(longest.batch), 0)
    fill = unknown | {"input_ids": pad_token_id, "labels": ignore_index}
    chosen = _unlike([row for row in rows if join([longest.batch, row.batch], fill) is not None])
    along = _along_tokens([row.batch for row in rows])
    together = trimmed(join([row.batch for row in chosen], fill), along)

    def cut(batch: Batch, groups: Groups) -> list[Batch]:
        return [take(batch, group) for group in groups]

    def collated(groups: Groups) -> list[Batch]:
        """Join the rows of each group as their batches have them, at the width of the widest one."""
        joined = (join([chosen[n].batch for n in group], fill) for group in groups)
        return [in_form_of(own_form, trimmed(each, along)) for each in joined]

    return Sample(
        longest=in_form_of(own_form, trimmed(longest.batch, along)),
        together=in_form_of(own_form, together),
        cut=cut,
        collated=collated,
        names=[row.name for row in chosen],
    )


def _shows_padding(rows: Sequence[CollatedRow], pad_token_id: int) -> bool:
    """Return whether the rows are token ids, and some but not all of them end with padding.

    If none or all of them do, the batches may hold rows of one length, without any padding.
    """
    columns = [as_mapping(row.batch) for row in rows]
    ids = [each.get("input_ids") for each in columns if isinstance(each, Mapping)]
    last = [int(row[0, -1]) for row in ids if isinstance(row, Tensor) and row.ndim == 2]
    return len(last) == len(rows) and len({token == pad_token_id for token in last}) == 2


def _unlike(rows: Sequence[CollatedRow]) -> list[CollatedRow]:
    places, _ = unlike_places([row.length for row in rows], [row.kind for row in rows])
    return [rows[place] for place in places]


def _along_tokens(rows: Sequence[Batch]) -> set[str]:
    """Return the columns that have the shape of the attention mask in all rows, if the rows have several widths."""
    columns = [columns_of(row) for row in rows]
    masks = [of_row.get("attention_mask") for of_row in columns]
    if len({mask.shape for mask in masks if mask is not None}) < 2:
        return set()
    return {
        name
        for name in columns[0]
        if all(m is not None and is_along(of_row.get(name), m) for of_row, m in zip(columns, masks, strict=True))
    }


def _length(row: Batch) -> int:
    row = as_mapping(row)
    ids = row.get("input_ids") if isinstance(row, Mapping) else None
    if not isinstance(ids, Tensor):
        return 1
    mask = row.get("attention_mask")
    return int(mask.sum()) if isinstance(mask, Tensor) and mask.shape == ids.shape else ids.numel()


def _kind(row: Batch) -> int | None:
    targets = targets_of(row)
    is_class = targets is not None and targets.ndim == 1 and not targets.is_floating_point()
    return int(targets) if targets is not None and is_class else None
