"""The user's data as rows: a sized, indexable collection of mappings or (inputs, targets) tuples."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute
from datasets import Dataset
from torch import Tensor
from torch.utils.data import TensorDataset

from ..errors import DataError, listed
from ..objective.prefixed import length_columns
from ..planning.base_plan import BasePlan
from ..planning.batch_size import BatchSizes
from ..planning.plan import Plan
from ..runtime.state_guards import Generators, preserve_rng, seed_all
from ..settings.recipe import Recipe
from .encode_table import Encode, encode_table
from .forms import ChangedRows
from .row import Row, as_row, check_row, is_row, length_of, tokens_of
from .table import make_table

# Takes rows and the position of the first one, and returns rows. May raise a DataError that names a row.
Step = Callable[[list[Row], int], list[Row]]
# Takes columns of rows, and the position of the first row.
Report = Callable[[Mapping[str, list], int], None]

_LENGTH_SAMPLE = 1000
_FEW = 8  # rows to fetch, to find out whether fetching draws random numbers
_NAMED = 8  # the most rows to name in one message
_ROW = 0xA6  # separates the random numbers of rows from other uses of the seed


class Rows:
    """Rows, fetched by position. The error for a row that cannot be fetched names that row.

    Attributes:
        draw: whether fetching a row has drawn random numbers from the generators of Python, NumPy or torch, as random
            crops do. Once it has, each row is fetched separately with its own seed, beginning with the rows of that
            fetch. A row's random numbers then depend neither on the rows fetched with it nor on the process that
            fetches it, and the generators keep their state.
    """

    def __init__(
        self,
        argument: str,
        source: Any,
        positions: Sequence[int] | None = None,
        names: Sequence[int] | None = None,
        part: str = "",
    ) -> None:
        """Args:
        argument: the name of the argument that the rows came from, for messages.
        source: anything with `__len__` and `__getitem__`.
        positions: the indices of these rows in `source`; None for all.
        names: for each index in `source`, the index in the user's data; None if they are the same.
        part: words that say which part of the data these rows are, put before `argument` in messages about all of them.
        """
        self.argument = argument
        self.source = source
        self._positions = positions
        self._names = names
        self.draw = False
        self._part = part

    def __len__(self) -> int:
        return len(self.source) if self._positions is None else len(self._positions)

    def name_of(self, position: int) -> str:
        """Return how messages name a row: by its index in the user's data."""
        return f"row {self._name(position)}"

    def names_of(self, positions: Sequence[int]) -> str:
        """Return the name in messages for several rows that include a faulty one."""
        return f"rows {listed([str(self._name(position)) for position in positions], _NAMED)}"

    @property
    def row_names(self) -> list[int] | None:
        """For each position, the number by which messages name the row; None if it is the position."""
        is_position = self._positions is None and self._names is None
        return None if is_position else [self._name(position) for position in range(len(self))]

    @property
    def describe_all(self) -> str:
        """How messages name all the rows that were checked."""
        return f"{self._part}`{self.argument}`"

    @property
    def if_none_is_fit(self) -> str:
        """More advice if none of the checked rows is usable: a sentence with a space before it, or an empty string."""
        return ""

    def find_draws(self) -> None:
        """Set `draw` from a few rows, spread evenly over all, so that it is usually right before workers start."""
        n = min(_FEW, len(self))
        self.fetch([i * len(self) // n for i in range(n)])

    def fetch(self, positions: Sequence[int], seed: Sequence[int] = ()) -> list[Row]:
        """Return the rows at these positions, in that order.

        Args:
            seed: seeds a row's random numbers, together with its position, if rows draw any.

        Raises:
            DataError: if the source raises, or returns something that is not a row. It names the row.
        """
        indices = [self._at(position) for position in positions]
        if not self.draw:
            before = Generators.now()
            rows = self._as_they_are(indices)
            if before.unchanged():
                return rows
            before.restore()
            self.draw = True
        with preserve_rng():
            return [
                self._drawn(index, (*seed, _ROW, position)) for index, position in zip(indices, positions, strict=True)
            ]

    @property
    def are_token_ids(self) -> bool:
        """Whether each row is a tensor of token ids and nothing else."""
        return isinstance(self.source[0], Tensor)

    @property
    def in_memory(self) -> bool:
        """Whether all rows can be read quickly, because fetching a row computes nothing."""
        if isinstance(self.source, Dataset):
            return self.source.format["type"] != "custom"
        return isinstance(self.source, list | TensorDataset) and not self.draw

    @property
    def are_endless(self) -> bool:
        """Whether more rows may follow than `len` counts."""
        return False

    @property
    def have_tokens(self) -> bool:
        """Whether a row's length counts tokens, or elements of its first column, and not characters of a string."""
        row = self.fetch([0])[0]
        name = next(iter([*length_columns(row), *row]), None) if isinstance(row, Mapping) else None
        return name is None or not isinstance(row[name], str)

    def lengths(self, positions: Sequence[int] | None = None) -> list[int] | None:
        """Return the lengths in tokens of the rows at these positions (None: of all rows); None if the rows would have
        to be computed for it."""
        every = self._lengths
        return every if every is None or positions is None else [every[position] for position in positions]

    @cached_property
    def _lengths(self) -> list[int] | None:
        if isinstance(self.source, Dataset) and (names := length_columns(self.source.column_names)):
            table = self.source.select_columns(names).with_format("arrow")[:]
            columns = [pyarrow.compute.list_value_length(table[name]).fill_null(0).to_pylist() for name in names]
            lengths = list(map(max, zip(*columns, strict=True)))
            return lengths if self._positions is None else [lengths[n] for n in self._positions]
        return [length_of(row) for row in self.fetch(range(len(self)))] if isinstance(self.source, list) else None

    def column(self, name: str) -> "pa.ChunkedArray | list[Any] | None":
        """Return a column, row by row; None if there is none, or if the rows would have to be computed for it.

        Tuples have the columns `inputs` and `targets`.
        """
        if isinstance(self.source, Dataset):
            if name not in self.source.column_names or self.source.format["type"] == "custom":
                return None
            column = self.source.select_columns([name]).with_format("arrow")[:][name]
            return column if self._positions is None else column.take(self._positions)
        if not isinstance(self.source, list):
            return None
        first = self.fetch([0])[0]
        if name not in (first if isinstance(first, Mapping) else ("inputs", "targets")):
            return None
        rows = self.fetch(range(len(self)))
        if isinstance(first, tuple):
            return [row[("inputs", "targets").index(name)] for row in rows]
        return [row[name] for row in rows] if all(name in row for row in rows) else None

    def longest(self, limit: int | None) -> int | None:  # noqa: ARG002
        """Return the length of the longest row; None if it is unknown.

        Args:
            limit: the most tokens that the model and the tokenizer accept in a row.
        """
        lengths = self.lengths()
        return max(lengths) if lengths else None

    def on_arrival(self, step: Step) -> None:
        """Apply a step to rows as they arrive. Here, it does nothing: all rows are present, and were checked."""

    def encoded(self, encode: Encode, columns: Sequence[str], n_processes: int = 1) -> "Rows":  # noqa: ARG002
        """Return the rows that `encode` makes of these, of `columns` alone. `encode_table` describes the arguments."""
        return self.replaced(encode_table(self.table, encode, n_processes, self.argument))

    def with_column(self, name: str, convert: Callable[[Any, str], Any]) -> "Rows":
        """Return the rows with one column converted.

        Args:
            convert: returns the new value, given the old one and the name of the row to begin a message with.
        """

        def changed(row: Row, index: int) -> Row:
            name_of_row = f"In `{self.argument}`, row {index if self._names is None else self._names[index]}"
            return {**row, name: convert(row.get(name), name_of_row)}

        source = self.source
        if isinstance(source, Dataset) and source.format["type"] != "custom":
            values = [changed({name: value}, n)[name] for n, value in enumerate(source.with_format(None)[name])]
            source = source.remove_columns(name).add_column(name, values)
        elif isinstance(source, list):
            source = [changed(row, n) for n, row in enumerate(source)]
        else:
            source = ChangedRows(source, changed)
        return Rows(self.argument, source, self._positions, self._names, self._part)

    def take_out(self, columns: Sequence[str], report: Report | None) -> "Rows":
        """Return the rows as a table without some columns.

        Args:
            report: is called with these columns; for a stream, with those of each batch of rows that arrives.
        """
        table = self.table
        if report is not None:
            report({name: table[name][:] for name in columns}, 0)
        return self.replaced(table.remove_columns(list(columns)))

    def plan(self, recipe: Recipe, batch_sizes: BatchSizes, n_validation_rows: int) -> BasePlan:
        """Return the plan of a run over these rows."""
        return Plan(
            len(self),
            recipe.n_epochs,
            batch_sizes,
            recipe.random_seed,
            n_validation_rows,
            recipe.remainder,
            recipe.max_updates,
            recipe.learning_rate_scaling,
        )

    def subset(self, positions: Sequence[int], part: str = "") -> "Rows":
        return Rows(self.argument, self.source, [self._at(position) for position in positions], self._names, part)

    @cached_property
    def table(self) -> Dataset:
        """These rows as a table, without other rows of their source.

        Raises:
            DataError: if the rows do not form a table. It names the first row that does not fit.
        """
        if not isinstance(self.source, Dataset):
            return make_table(self.fetch(range(len(self))), self.argument, self.name_of)
        return self.source if self._positions is None else self.source.select(self._positions)

    def replaced(self, source: Any) -> "Rows":
        """Return rows made from these, one from each, that keep their names in messages."""
        return Rows(self.argument, source, names=[self._name(position) for position in range(len(self))])

    def _name(self, position: int) -> int:
        return self._at(position) if self._names is None else self._names[self._at(position)]

    def _at(self, position: int) -> int:
        return position if self._positions is None else self._positions[position]

    def _as_they_are(self, indices: Sequence[int]) -> list[Row]:
        if hasattr(self.source, "__getitems__"):  # reads a table once, not once per row
            with suppress(Exception):  # the rows are read one by one below, to name the faulty one
                rows = [as_row(row) for row in self.source.__getitems__(indices)]
                if len(rows) == len(indices) and all(map(is_row, rows)):
                    return rows
        return [self._one(index) for index in indices]

    def _drawn(self, index: int, seed: Sequence[int]) -> Row:
        seed_all(*seed)
        return self._one(index)

    def _one(self, index: int) -> Row:
        name = index if self._names is None else self._names[index]
        try:
            row = as_row(self.source[index])
        except DataError:  # already names the row
            raise
        except Exception as error:
            raise DataError(
                f"Row {name} of `{self.argument}` cannot be read: {error!r}. Fix or drop the row."
            ) from error
        if not is_row(row):
            check_row(row, self.argument, f"row {name}" if name else "its first row")
        return row


def mean_tokens(rows: Rows) -> float:
    """Return the mean number of tokens of up to 1,000 rows, spread evenly over all."""
    n = min(_LENGTH_SAMPLE, len(rows))
    return sum(map(tokens_of, rows.fetch([i * len(rows) // n for i in range(n)]))) / n
