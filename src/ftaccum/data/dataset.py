"""Whatever the user hands over, as rows: a sized, indexable collection of mappings or (inputs, targets) tuples."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute
from datasets import Dataset
from torch import Tensor
from torch.utils.data import TensorDataset

from ..errors import DataError
from ..planning.base_plan import BasePlan
from ..planning.batch_size import BatchSizes
from ..planning.plan import Plan
from ..runtime.state_guards import Generators, preserve_rng, seed_all
from ..settings import Recipe
from .forms import ChangedRows
from .row import Row, as_row, check_row, is_row, length_of
from .table import make_table

# Rows as they came, and the position of the first one → rows. It raises DataErrors that name a row.
Step = Callable[[list[Row], int], list[Row]]
# Columns of a batch of rows, and the positions of these → columns.
Encode = Callable[[Mapping[str, list], Sequence[int]], dict[str, list]]
# Columns of rows, and the position of the first one.
Report = Callable[[Mapping[str, list], int], None]

_LENGTH_SAMPLE = 1000
_FEW = 8  # rows to see whether fetching them draws
_NAMED = 8  # rows, in a message on several
_ROW = 0xA6  # keeps what a row draws apart from other uses of the seed


class Rows:
    """Rows by position. Fetching one that cannot be had names it.

    Attributes:
        draw: whether fetching any of them was seen to draw from the generators of Python, NumPy or torch, as random
            crops do. From then on, each row is fetched by itself and from a seed of its own: what it draws does not
            depend on what is fetched with it, nor on which process fetches it, and moves no one else's draws. It does
            not depend on when it was seen either: what was fetched with the first draw is fetched once more.
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
        argument: what the user calls them, for messages.
        source: anything with `__len__` and `__getitem__`.
        positions: the rows of `source` that these are; all, where None.
        names: by position in `source`, the index in what the user handed over; the position itself, where None.
        part: which of the rows of that name they are, for messages about all of them: words before the name.
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
        """What to call a row in a message: its index in what the user handed over."""
        return f"row {self._name(position)}"

    def names_of(self, positions: Sequence[int]) -> str:
        """What to call several rows, of which one is at fault."""
        named = ", ".join(str(self._name(position)) for position in positions[:_NAMED])
        more = f" and {len(positions) - _NAMED} more" if len(positions) > _NAMED else ""
        return f"rows {named}{more}"

    @property
    def describe_all(self) -> str:
        """What to call all of them in a message, that is, those that were looked at."""
        return f"{self._part}`{self.argument}`"

    @property
    def if_none_is_fit(self) -> str:
        """What else to do where none of those that were looked at will do: a sentence, or nothing."""
        return ""

    def find_draws(self) -> None:
        """Sees whether a few rows, spread evenly over all, draw, so that workers mostly know it from the start."""
        n = min(_FEW, len(self))
        self.fetch([i * len(self) // n for i in range(n)])

    def fetch(self, positions: Sequence[int], seed: Sequence[int] = ()) -> list[Row]:
        """The rows at these positions, in that order.

        Args:
            seed: with a row's position, settles its draws, where rows draw.

        Raises:
            DataError: naming the row, where the source raises, or it is none.
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
        """Whether all rows can be looked at in no time, since none is computed when it is fetched."""
        if isinstance(self.source, Dataset):
            return self.source.format["type"] != "custom"
        return isinstance(self.source, list | TensorDataset) and not self.draw

    @property
    def are_endless(self) -> bool:
        """Whether more rows come than `len` says."""
        return False

    @property
    def have_tokens(self) -> bool:
        """Whether the length of a row counts tokens, or whatever its first column has, and not letters."""
        row = self.fetch([0])[0]
        return not (isinstance(row, Mapping) and isinstance(row.get("input_ids", next(iter(row.values()), None)), str))

    def lengths(self, positions: Sequence[int] | None = None) -> list[int] | None:
        """The lengths of those rows in tokens (None: of every row), where they can be told without computing the rows;
        else None."""
        every = self._lengths
        return every if every is None or positions is None else [every[position] for position in positions]

    @cached_property
    def _lengths(self) -> list[int] | None:
        if isinstance(self.source, Dataset) and "input_ids" in self.source.column_names:
            table = self.source.select_columns(["input_ids"]).with_format("arrow")[:]
            lengths = pyarrow.compute.list_value_length(table["input_ids"]).fill_null(0).to_pylist()
            return lengths if self._positions is None else [lengths[n] for n in self._positions]
        if isinstance(self.source, list):
            return [length_of(row) for row in self.fetch(range(len(self)))]
        return None

    def column(self, name: str) -> "pa.ChunkedArray | list[Any] | None":
        """Return a column, row by row, where it can be had without computing the rows; else None.

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
        """Return the length of the longest row; None where it is not known.

        Args:
            limit: the most tokens of a row that model and tokenizer take.
        """
        lengths = self.lengths()
        return max(lengths) if lengths else None

    def on_arrival(self, step: Step) -> None:
        """Apply a step to rows as they come: here they are all there, and have been looked at."""

    def encoded(self, encode: Encode, columns: Sequence[str], name: str) -> "Rows":  # noqa: ARG002
        """Return the rows that `encode` makes of these, batch by batch.

        Args:
            columns: those that `encode` reads.
            name: what to call it on a progress bar.
        """
        table = self.table
        table = table.map(encode, with_indices=True, batched=True, remove_columns=table.column_names, desc=name)
        return self.replaced(table)

    def with_column(self, name: str, convert: Callable[[Any, str], Any]) -> "Rows":
        """Return the rows with another column in the place of one.

        Args:
            convert: makes the new value from the old one and what to call its row, as a sentence on it begins.
        """

        def changed(row: Row, index: int) -> Row:
            name_of_row = f"Of `{self.argument}`, row {index if self._names is None else self._names[index]}"
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
        """Return the rows of a table without some columns.

        Args:
            report: gets these columns; of a stream, batch by batch as rows come.
        """
        table = self.table
        if report is not None:
            report({name: table[name][:] for name in columns}, 0)
        return self.replaced(table.remove_columns(list(columns)))

    def plan(self, recipe: Recipe, batch_sizes: BatchSizes, n_validation_rows: int) -> BasePlan:
        """Return the windows of a run over these rows."""
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
        """The rows, and no others of their source, as a table.

        Raises:
            DataError: naming the first row that has no place in it.
        """
        if not isinstance(self.source, Dataset):
            return make_table(self.fetch(range(len(self))), self.argument, self.name_of)
        return self.source if self._positions is None else self.source.select(self._positions)

    def replaced(self, source: Any) -> "Rows":
        """Something else made of each of these rows, under their names."""
        return Rows(self.argument, source, names=[self._name(position) for position in range(len(self))])

    def _name(self, position: int) -> int:
        return self._at(position) if self._names is None else self._names[self._at(position)]

    def _at(self, position: int) -> int:
        return position if self._positions is None else self._positions[position]

    def _as_they_are(self, indices: Sequence[int]) -> list[Row]:
        if hasattr(self.source, "__getitems__"):  # one read of the table instead of one a row
            with suppress(Exception):  # read one by one below, the faulty row gets its name
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
        except DataError:  # it names the row
            raise
        except Exception as error:
            raise DataError(
                f"Row {name} of `{self.argument}` cannot be read: {error!r}. Fix or drop the row."
            ) from error
        if not is_row(row):
            check_row(row, self.argument, f"row {name}" if name else "its first row")
        return row


def mean_length(rows: Rows) -> float:
    """Mean length in tokens, of up to 1,000 rows spread evenly over all."""
    n = min(_LENGTH_SAMPLE, len(rows))
    return sum(map(length_of, rows.fetch([i * len(rows) // n for i in range(n)]))) / n
