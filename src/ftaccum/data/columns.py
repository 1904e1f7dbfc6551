"""The columns of a batch: which ones every row must have, and what sets the size of each of their dimensions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from torch import Tensor

from ..objective.item_counts import TOKEN_COLUMNS
from ..objective.model_forward import is_label
from ..objective.prefixed import ids_of, mask_of
from .row import Row
from .values import OddRowError, column_name, is_numeric, tensor_of

# The first of these columns that rows have shows a row's number of tokens, in this dimension.
_TOKEN_BASES = (("input_ids", -1), ("attention_mask", -1), ("inputs_embeds", 0), ("input_values", -1))
_SOUNDS = ("input_values", "input_features")  # padded with silence


class Along(Enum):
    """What sets the size of a dimension that differs from row to row."""

    TOKENS = "input_ids"
    TARGETS = "labels"
    NOTHING = "nothing else"


Size = int | Along
Shape = tuple[int, ...]


@dataclass(frozen=True)
class ColumnRules:
    """The rules by which a batch takes columns from rows.

    Attributes:
        accepted: the columns that the model takes; None if it takes any.
        keep_all: whether to keep other columns of numbers, for a `loss_fn`.
        own_targets: whether labels may have another length than `input_ids`, as for an encoder-decoder; None if this is
            unknown.
    """

    accepted: frozenset[str] | None = None
    keep_all: bool = False
    own_targets: bool | None = None

    @property
    def names(self) -> frozenset[str]:
        """The columns that are taken whatever they hold.

        A plain module may have another name for its ids. Positions identify packed rows, also for models without them.
        """
        return (self.accepted or frozenset()) | {"input_ids", "labels", "position_ids"}

    def accepts(self, name: str) -> bool:
        """Return whether the model or a `loss_fn` takes a column of this name."""
        return self.accepted is None or self.keep_all or name in self.accepted

    def takes(self, name: str, value: Any) -> bool:
        """Return whether a batch takes a column of this name, given a row's value."""
        if name in self.names:
            return True
        return (self.keep_all or self.accepted is None) and is_numeric(value)

    def may_pad_freely(self, name: str, *, floats: bool, n_dims: int, with_ids: bool) -> bool | None:
        """Return whether a column may have a length of its own, because its padding is known to be ignored.

        Return None if it may unless most rows have the same length.
        """
        if is_label(name):
            fits = name == "labels" and not floats and (with_ids or n_dims == 1)
            known = with_ids or self.own_targets is None
            return fits and (self.own_targets if known else True)  # without ids: a transcript, as for CTC
        if name.startswith("decoder_") or name in _SOUNDS:
            return True
        return None if name.endswith("_mask") and name not in TOKEN_COLUMNS else False


@dataclass(frozen=True)
class Columns:
    """The columns of a batch, derived from a few rows.

    Attributes:
        rules: which columns are taken.
        keys: the name in rows, by name in a batch.
        sizes: the required size of each dimension of a row's value, by name in a batch.
        token_base: the column, and its dimension, whose size is the number of tokens; None if rows have no tokens.
        ignored: columns that rows may have, and that are left out.
    """

    rules: ColumnRules
    keys: dict[str, str]
    sizes: dict[str, tuple[Size, ...]]
    token_base: tuple[str, int] | None
    ignored: frozenset[str] = frozenset()

    @classmethod
    def of(cls, rows: Sequence[Row], rules: ColumnRules) -> "Columns":
        """Derive the columns from rows. What most of the rows have is required.

        Raises:
            OddRowError: if a row lacks a column that others have.
        """
        keys = _names({key: None for row in rows for key, value in row.items() if value is not None})
        keys = {name: key for name, key in keys.items() if rules.takes(name, _first_value(rows, key))}
        for key in keys.values():
            check_presence(key, [n for n, row in enumerate(rows) if row.get(key) is None], len(rows))
        tensors = {name: [tensor_of(rows[n], key, n) for n in range(len(rows))] for name, key in keys.items()}
        shapes = {name: [tuple(t.shape) for t in column] for name, column in tensors.items()}
        integers = {name for name, column in tensors.items() if not column[0].is_floating_point()}
        base = _token_base(shapes, integers)
        counts = {Along.TOKENS: _counts(shapes, base)}
        sizes: dict[str, tuple[Size, ...]] = {}
        for name in sorted(shapes, key=lambda name: name != "labels"):  # decoder inputs run along labels
            ids = ids_of(name)
            if ids in shapes and len(shapes[name][0]) == 1:
                sizes[name] = (Along.TOKENS if base is not None and base[0] == ids else Along.NOTHING,)
                continue
            free = rules.may_pad_freely(
                name, floats=name not in integers, n_dims=len(shapes[name][0]), with_ids="input_ids" in shapes
            )
            sizes[name] = _sizes(name, shapes[name], counts, free=free, integers=name in integers)
            if name == "labels" and sizes[name] == (Along.NOTHING,):
                counts[Along.TARGETS] = [shape[0] if shape else 0 for shape in shapes[name]]
        return cls(rules, keys, {name: sizes[name] for name in keys}, base)

    @property
    def mask_sizes(self) -> dict[str, tuple[Size, ...]]:
        """The required sizes of the dimensions of each mask over tokens that rows may leave out, by its name."""
        of_texts = {
            mask: self.sizes[ids]
            for ids in self.sizes
            if ids_of(ids) == ids and len(self.sizes[ids]) == 1 and self.rules.accepts(mask := mask_of(ids))
        }
        return {"attention_mask": self.sizes.get("input_ids", (Along.TOKENS,))} | of_texts

    def without(self, name: str) -> "Columns":
        """Return the columns except one."""
        keys = {other: key for other, key in self.keys.items() if other != name}
        return replace(self, keys=keys, sizes={other: self.sizes[other] for other in keys})

    def tensors(self, rows: Sequence[Row]) -> dict[str, list[Tensor]]:
        """Return the columns of some rows as tensors that are not padded yet.

        Raises:
            OddRowError: if a row lacks a column, has one more, or has one of another shape.
        """
        for place, row in enumerate(rows):
            self._check_names(place, row)
        found = {
            name: [tensor_of(row, key, place) for place, row in enumerate(rows)] for name, key in self.keys.items()
        }
        shapes = {name: [tuple(t.shape) for t in column] for name, column in found.items()}
        counts = self.counts(shapes)
        for name in found:
            self._check_shapes(name, shapes[name], counts)
        self._check_prefixed(shapes)
        return found

    def counts(self, shapes: Mapping[str, Sequence[Shape]]) -> dict[Along, list[int] | None]:
        """Return the number of tokens and of targets of each row."""
        targets = [shape[0] if shape else 0 for shape in shapes.get("labels", ())]
        return {Along.TOKENS: _counts(shapes, self.token_base), Along.TARGETS: targets}

    def problem(self, name: str, shape: Shape, n_tokens: int | None, n_targets: int | None) -> str | None:
        """Return what is wrong with the shape of a row's value, given its numbers of tokens and targets; or None."""
        sizes = self.sizes[name]
        if len(shape) != len(sizes):
            return f"its column {self.keys[name]!r} has {len(shape)} dimensions, but {len(sizes)} in other rows"
        lengths = {Along.TOKENS: n_tokens, Along.TARGETS: n_targets}
        wanted = tuple(
            found if size is Along.NOTHING else lengths[size] if isinstance(size, Along) else size
            for size, found in zip(sizes, shape, strict=True)
        )
        if shape == wanted:
            return None
        size = next(size for size, n, m in zip(sizes, shape, wanted, strict=True) if n != m)
        base = "labels" if size is Along.TARGETS else self.token_base[0] if self.token_base else ""
        reason = f"to match its {base!r}" if isinstance(size, Along) else "as in other rows"
        return f"its column {self.keys[name]!r} has the shape {shape}, but must have {wanted} {reason}"

    def _check_names(self, place: int, row: Row) -> None:
        if not isinstance(row, Mapping):
            raise OddRowError(place, "it has no columns, but other rows do")
        for key in self.keys.values():
            if row.get(key) is None:
                raise OddRowError(place, f"it has no value in its column {key!r}, but other rows do", _SAME_COLUMNS)
        for key in row.keys() - self.keys.values():
            name = column_name(key)
            known = name in self.keys or name in self.ignored or row[key] is None
            if not known and self.rules.takes(name, row[key]):
                problem = f"it has a value in its column {key!r}, but other rows have none"
                raise OddRowError(place, problem, _SAME_COLUMNS)

    def _check_shapes(self, name: str, shapes: Sequence[Shape], counts: Mapping[Along, Sequence[int] | None]) -> None:
        tokens, targets = counts[Along.TOKENS], counts[Along.TARGETS]
        for place, shape in enumerate(shapes):
            problem = self.problem(name, shape, tokens[place] if tokens else None, targets[place] if targets else None)
            if problem is not None:
                raise OddRowError(place, problem)

    def _check_prefixed(self, shapes: Mapping[str, Sequence[Shape]]) -> None:
        """Check that columns such as `chosen_input_ids` and `chosen_labels` have the same length in each row."""
        for name, of_rows in shapes.items():
            ids = ids_of(name) or name
            for place, (shape, wanted) in enumerate(zip(of_rows, shapes.get(ids, of_rows), strict=True)):
                if len(wanted) == 1 and shape != wanted:
                    problem = f"its column {self.keys[name]!r} has the shape {shape}, but must have {wanted}"
                    raise OddRowError(place, f"{problem} to match its {ids!r}")


_SAME_COLUMNS = "Give every row the same columns, drop the row or the column, or give a `data_collator`."


def check_presence(key: str, lacking: Sequence[int], n_rows: int) -> None:
    """Raise OddRowError if some rows have a column and others lack it, for the first row of the smaller group.

    Args:
        lacking: the places of the rows that lack the column, in ascending order.
    """
    n_having = n_rows - len(lacking)
    if not lacking or not n_having:
        return
    if len(lacking) <= n_having:
        problem = f"it has no value in its column {key!r}, but {n_having} of {n_rows} rows have one"
        raise OddRowError(lacking[0], problem, _SAME_COLUMNS)
    absent = set(lacking)
    first = next(n for n in range(n_rows) if n not in absent)
    problem = f"it has a value in its column {key!r}, but {len(lacking)} of {n_rows} rows have none"
    raise OddRowError(first, problem, _SAME_COLUMNS)


def _names(keys: Mapping[str, Any]) -> dict[str, str]:
    return {column_name(key): key for key in keys} | {key: key for key in keys}  # the exact name wins


def _first_value(rows: Sequence[Row], key: str) -> Any:
    return next(value for row in rows if (value := row.get(key)) is not None)


def _token_base(shapes: Mapping[str, Sequence[Shape]], integers: set[str]) -> tuple[str, int] | None:
    known = [(name, dim) for name, dim in _TOKEN_BASES if name in shapes and shapes[name][0]]
    # A plain module may give its token ids any name. Those of several texts have no common length.
    texts = [(name, 0) for name in shapes if ids_of(name) == name and len(shapes[name][0]) == 1]
    others = [name for name in shapes if not is_label(name) and ids_of(name) not in shapes]
    named = [(name, 0) for name in others if name in integers and len(shapes[name][0]) == 1]
    return next(iter([*known, *(texts if len(texts) == 1 else ()), *named]), None)


def _counts(shapes: Mapping[str, Sequence[Shape]], base: tuple[str, int] | None) -> list[int] | None:
    if base is None:
        return None
    name, dim = base
    return [shape[dim] if shape else 0 for shape in shapes[name]]


def _sizes(
    name: str,
    shapes: Sequence[Shape],
    counts: Mapping[Along, Sequence[int] | None],
    *,
    free: bool | None,
    integers: bool,
) -> tuple[Size, ...]:
    n_dims = Counter(map(len, shapes)).most_common(1)[0][0]
    places = [n for n, shape in enumerate(shapes) if len(shape) == n_dims]
    lengths = {along: [of_all[n] for n in places] for along, of_all in counts.items() if of_all is not None}
    if n_dims == 1 and name in TOKEN_COLUMNS and Along.TOKENS in lengths:
        return (Along.TOKENS,)
    return tuple(
        _size([shapes[n][dim] for n in places], lengths, free=free, fixed_first=is_label(name) and not integers)
        for dim in range(n_dims)
    )


def _size(
    sizes: Sequence[int],
    lengths: Mapping[Along, Sequence[int]],
    *,
    free: bool | None,
    fixed_first: bool,
) -> Size:
    """Return the size of a dimension in most rows: that of the tokens or targets, a fixed one, or any."""
    size, n_equal = Counter(sizes).most_common(1)[0]
    agreeing = {along: sum(n == m for n, m in zip(sizes, expected, strict=True)) for along, expected in lengths.items()}
    along = max(agreeing, key=lambda each: agreeing[each], default=None)
    n_along = agreeing[along] if along is not None else 0
    if n_equal == len(sizes) and (fixed_first or n_along < n_equal):
        return size
    if along is not None and 2 * n_along >= len(sizes) and n_along >= n_equal:
        return along
    return Along.NOTHING if free or (free is None and 2 * n_equal <= len(sizes)) else size
