"""The choice of rows to measure a loss on, from batches that are collated already."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

from accelerate.utils import send_to_device
from torch import Tensor

from ..data.batches import as_mapping, can_be_taken_apart, in_form_of, join, take, trimmed
from ..data.column_fills import columns_of, is_along
from ..data.probe_rows import unlike_places
from ..errors import DataError
from ..objective.item_counts import Batch, ItemCounter, rows_of, targets_of
from ..objective.own_rules import columns_by_name
from ..objective.sample import Groups, RowGroup, Sample
from ..runtime.process_group import ProcessGroup

_MOST_ROWS = 256  # to choose from, in each process
_MOST_RARE, _GROUP = 24, 4  # rare rows in all, and the rows of a batch of them, as many as the sample has
_SHOWN = 2  # rows for each value: a rule that rests on a single row may explain its loss by chance


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
    """Return a few rows of a window on all processes, for the objective to measure its loss on.

    These are the shortest row with a label that counts, the longest, and two in between with other classes; and rows
    that cover the values of columns with few values. All processes call this, and get the same rows.

    Args:
        batches: this process's batches of the window.

    Returns:
        The sample; None if no row has a label that counts.

    Raises:
        DataError: on all processes, if the batches of one of them cannot be split into rows.
    """
    own = process_group.run_on_all(lambda: _chosen_rows(batches, item_counter))
    everyone = process_group.gather(own)
    if not process_group.is_single:
        everyone = [
            (_of_process(rank, unlike), _of_process(rank, rare)) for rank, (unlike, rare) in enumerate(everyone)
        ]
    unlike, rare = zip(*everyone, strict=True)
    return sample_of_rows([*chain(*unlike)], [*chain(*rare)], item_counter.ignore_index, pad_token_id)


def _of_process(rank: int, rows: Sequence[CollatedRow]) -> list[CollatedRow]:
    return [replace(row, name=f"{row.name} of process {rank}") for row in rows]


def _chosen_rows(batches: Sequence[Batch], item_counter: ItemCounter) -> tuple[list[CollatedRow], list[CollatedRow]]:
    """Return up to four unlike rows with labels that count, and rows with rare values.

    Raises:
        DataError: if the batches cannot be split into rows.
    """
    rows = _rows_of(batches)
    counting = [row for row in rows if item_counter.has_items(row.batch)]
    unlike = _unlike(counting) if counting else []
    return unlike, _rare(rows)


def _rows_of(batches: Sequence[Batch]) -> list[CollatedRow]:
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
            for row in (take(on_host, [place]),)
        ]
    return rows


def sample_of_rows(
    rows: Sequence[CollatedRow], rare: Sequence[CollatedRow], ignore_index: int, pad_token_id: int
) -> Sample | None:
    """Return a sample of up to four of these rows, and of up to 24 rare ones; None if there are no rows.

    Rows that have other columns or shapes than the longest one are left out.
    """
    longest = max(rows, key=lambda row: row.length, default=None)
    if longest is None:
        return None
    own_form = longest.batch
    if not isinstance(own_form, Mapping) and _shows_padding(rows, pad_token_id):
        rows, rare = ([replace(row, batch=as_mapping(row.batch)) for row in each] for each in (rows, rare))
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
        rare=_groups([row for row in rare if join([longest.batch, row.batch], fill) is not None], fill),
    )


def _groups(rare: Sequence[CollatedRow], fill: Mapping[str, int]) -> list[RowGroup]:
    """Return rare rows in small groups that all begin with the first of them."""
    numbered = [*enumerate(rare[: _MOST_RARE + 1])]
    groups = []
    for start in range(1, len(numbered), _GROUP - 1):
        some = [numbered[0], *numbered[start : start + _GROUP - 1]]
        together = in_form_of(rare[0].batch, join([row.batch for _, row in some], fill))
        take_rows = partial(take, together)
        groups.append(RowGroup(together, take_rows, [n for n, _ in some], [row.name for _, row in some]))
    return groups


def _shows_padding(rows: Sequence[CollatedRow], pad_token_id: int) -> bool:
    """Return whether the rows are token ids, and some but not all of them end with padding.

    If none or all of them do, the batches may hold rows of one length, without any padding.
    """
    columns = [as_mapping(row.batch) for row in rows]
    ids = [each.get("input_ids") for each in columns if isinstance(each, Mapping)]
    last = [int(row[0, -1]) for row in ids if isinstance(row, Tensor) and row.ndim == 2]
    return len(last) == len(rows) and len({token == pad_token_id for token in last}) == 2


def _rare(rows: Sequence[CollatedRow]) -> list[CollatedRow]:
    """Return rows that cover the values of columns with one whole number per row.

    The first has the most frequent values. The others follow from the rarest value up.
    """
    values = {row.name: _whole_numbers(row.batch) for row in rows}
    counts = Counter(chain.from_iterable(values.values()))
    kinds = Counter(column for column, _ in counts)
    values = {name: {each for each in own if kinds[each[0]] <= len(rows) // 2} for name, own in values.items()}
    by_rarity = sorted(
        (row for row in rows if values[row.name]), key=lambda row: min(counts[each] for each in values[row.name])
    )
    chosen: list[CollatedRow] = []
    shown: Counter[tuple[str, int]] = Counter()
    for row in [*by_rarity[-1:], *by_rarity[:-1]]:
        if len(chosen) <= _MOST_RARE and any(shown[each] < _SHOWN for each in values[row.name]):
            shown.update(values[row.name])
            chosen.append(row)
    return chosen


def _whole_numbers(row: Batch) -> set[tuple[str, int]]:
    """Return the values of a row in columns of one whole number per row, each with its column."""
    columns = columns_by_name(row).items()
    return {(name, int(c)) for name, c in columns if c.numel() == 1 and c.ndim == 1 and not c.is_floating_point()}


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
