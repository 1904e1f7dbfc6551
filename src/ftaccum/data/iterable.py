"""A stream as rows: read by the main process alone, and handed to all."""

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from datasets import IterableDataset as StreamingDataset

from ..errors import DataError
from ..planning.batch_size import BatchSizes
from ..planning.stream_plan import StreamPlan
from ..runtime.process_group import ProcessGroup
from ..runtime.single_process import single_process
from ..runtime.state_guards import Generators, preserve_rng, seed_all
from ..settings import Recipe
from .dataset import Encode, Report, Rows, Step
from .forms import is_nested, unnested
from .row import Row, as_row, check_row, length_of

LOOKED_AT = 256  # rows, before training
_DRAWS = 0x57  # keeps what a stream draws apart from other uses of the seed

# Calls a function on the main process alone, and comes to what it came to there, on all processes.
FromMain = Callable[[Callable[[], list[Row]]], list[Row]]


def is_stream(data: Any) -> bool:
    """Whether data come one row after the other, and cannot be asked for by position."""
    return isinstance(data, StreamingDataset | torch.utils.data.IterableDataset)


def is_split(stream: Any) -> bool:
    """Whether a stream of `datasets` gives each process a part of its own."""
    split = getattr(stream, "_distributed", None)
    return split is not None and split.world_size > 1


@contextmanager
def open_stream(data: Any, seed: int, process_group: ProcessGroup) -> Iterator["Stream | None"]:
    """Open training data as a stream, where they are one. All processes call it alike."""
    if not is_stream(data):
        yield None
        return
    with single_process(process_group.size) as as_single:
        yield Stream(data, "train_data", seed, process_group, as_single)


class Stream:
    """Reads a stream on the main process, for all: whatever it draws, and by whatever it would deal its rows to
    processes, none comes twice and none is lost.

    What it draws from the generators of Python, NumPy and torch follows the seed, and moves no one else's draws.
    """

    def __init__(
        self,
        source: Any,
        argument: str,
        seed: int,
        process_group: ProcessGroup,
        as_single: Callable[[], AbstractContextManager],
    ) -> None:
        """Args:
        argument: what the user calls it, for messages.
        as_single: a context in which this process seems to be the only one.
        """
        self.argument, self._source = argument, source
        self._process_group, self._as_single = process_group, as_single
        self.steps: list[Step] = []
        self._n_read = 0
        self._epoch = -1
        self._rows: Iterator[Row] | None = None  # of the epoch; None once it has ended
        with preserve_rng():
            seed_all(seed, _DRAWS)
            self._generators = Generators.now()

    def read(self, epoch: int, n: int) -> list[Row]:
        """Up to `n` more rows of an epoch, on all processes; fewer only where it has ended.

        Raises:
            DataError: on all processes, where the stream raises, or one of the steps.
        """
        try:
            return self._process_group.run_on_main(lambda: self._rows_on_main(epoch, n))
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"Rows of `{self.argument}` cannot be sent to other processes: {error!r}. Give tensors, arrays, "
                "numbers and text."
            ) from error

    def _rows_on_main(self, epoch: int, n: int) -> list[Row]:
        outside, first = Generators.now(), self._n_read
        self._generators.restore()
        try:
            rows = self._came(epoch, n)
            for step in self.steps:
                rows = step(rows, first)
            return rows
        finally:
            self._generators = Generators.now()
            outside.restore()

    def _came(self, epoch: int, n: int) -> list[Row]:
        rows: list[Row] = []
        try:
            with self._as_single():
                for row in itertools.islice(self._rows_of(epoch), n):
                    rows.append(row)
                    self._n_read += 1
        except Exception as error:
            raise DataError(
                f"`{self.argument}` cannot be read on, after {self._n_read} rows: {error!r}. Fix what it reads from, "
                "or have it pass over what cannot be read."
            ) from error
        if len(rows) < n:
            self._rows = None
        return rows

    def _rows_of(self, epoch: int) -> Iterator[Row]:
        if epoch != self._epoch:
            self._epoch = epoch
            if hasattr(self._source, "set_epoch"):
                self._source.set_epoch(epoch)
            self._rows = iter(self._source)
        return iter(()) if self._rows is None else self._rows


class StreamRows(Rows):
    """The rows of a stream, by the order in which they come, over all epochs.

    The first ones are there from the beginning, to be looked at: `len` counts these. They are trained on when their
    turn comes, as all others; those of windows that are done are let go.
    """

    def __init__(self, stream: Stream) -> None:
        """Raises:
        DataError: where there are no rows, or they are no rows.
        """
        super().__init__(stream.argument, stream)
        self._stream = stream
        rows = stream.read(0, LOOKED_AT)
        if not rows:
            raise DataError(f"`{self.argument}` has no rows. Check the files or the filter that it came from.")
        self._are_token_ids = isinstance(rows[0], torch.Tensor)
        self._n_looked_at = self._came = len(rows)
        self._taken = 0
        self._held = dict(enumerate(rows))
        self.on_arrival(self._as_rows)
        if all(map(is_nested, self._held.values())):
            self.on_arrival(lambda more, _: [unnested(row) if is_nested(row) else row for row in more])

    def __len__(self) -> int:
        return self._n_looked_at

    @property
    def describe_all(self) -> str:
        return f"`{self.argument}`, as far as its first {len(self)} rows tell,"

    @property
    def if_none_is_fit(self) -> str:
        return (
            f" Only these {len(self)} rows are looked at before training. Where later ones are fit, shuffle the stream "
            "(`.shuffle(buffer_size=10_000)`), or have it begin with such a row."
        )

    def find_draws(self) -> None:
        """They are there: what the stream drew for them is drawn."""

    def fetch(self, positions: Sequence[int], seed: Sequence[int] = ()) -> list[Row]:  # noqa: ARG002
        return [self._held[position] for position in positions]

    @property
    def are_endless(self) -> bool:
        return len(self) == LOOKED_AT

    @property
    def are_token_ids(self) -> bool:
        return self._are_token_ids

    def lengths(self, positions: Sequence[int] | None = None) -> list[int]:
        """The lengths of those rows; None: of those that were looked at."""
        return [length_of(row) for row in self.fetch(range(len(self)) if positions is None else positions)]

    def column(self, name: str) -> None:
        """Return None: rows are looked at as they come."""

    def longest(self, limit: int | None) -> int:
        """Return the length of the longest row that could come."""
        return limit or sys.maxsize

    def on_arrival(self, step: Step) -> None:
        """Apply a step to the rows that are there, and to all that come.

        Raises:
            DataError: what the step raises; for a row that comes later, where rows are taken.
        """
        self._held = dict(enumerate(step(list(self._held.values()), 0)))
        self._stream.steps.append(step)

    def encoded(self, encode: Encode, columns: Sequence[str], name: str) -> "StreamRows":  # noqa: ARG002
        """Encode the rows that are there, and all that come."""

        def encode_more(more: list[Row], first: int) -> list[Row]:
            if not more:
                return []
            # As in a table, a row without a column has None there.
            given = {name: [row.get(name) if isinstance(row, Mapping) else None for row in more] for name in columns}
            made = encode(given, range(first, first + len(more)))
            return [{name: values[n] for name, values in made.items()} for n in range(len(more))]

        self.on_arrival(encode_more)
        return self

    def with_column(self, name: str, convert: Callable[[Any, str], Any]) -> "StreamRows":
        """Convert a column of the rows that are there, and of all that come."""

        def convert_more(more: list[Row], first: int) -> list[Row]:
            names = [f"Of `{self.argument}`, {self.name_of(position)}" for position in range(first, first + len(more))]
            return [{**row, name: convert(row.get(name), of)} for row, of in zip(more, names, strict=True)]

        self.on_arrival(convert_more)
        return self

    def take_out(self, columns: Sequence[str], report: Report | None) -> "StreamRows":
        """Take columns out of the rows that are there, and of all that come, and report them."""

        def take_out_more(more: list[Row], first: int) -> list[Row]:
            if report is not None:
                report({name: [row[name] for row in more] for name in columns}, first)
            return [{name: value for name, value in row.items() if name not in columns} for row in more]

        self.on_arrival(take_out_more)
        return self

    def plan(self, recipe: Recipe, batch_sizes: BatchSizes, n_validation_rows: int) -> StreamPlan:
        """Return the windows that the stream gives."""
        assert recipe.max_updates is not None, "checked before training"
        return StreamPlan(
            recipe.n_epochs,
            batch_sizes,
            recipe.max_updates,
            self.take,
            recipe.random_seed,
            n_validation_rows,
            recipe.remainder,
            recipe.learning_rate_scaling,
        )

    def take(self, epoch: int, n: int, needed_from: int) -> int:
        """Gets up to `n` more rows of an epoch for training, and says how many there are: fewer only where it has
        ended. All processes call it alike.

        Args:
            needed_from: rows before this position are let go.
        """
        for position in [position for position in self._held if position < needed_from]:
            del self._held[position]
        missing = n - (self._came - self._taken)
        if missing > 0:
            rows = self._stream.read(epoch, missing)
            self._held |= dict(enumerate(rows, self._came))
            self._came += len(rows)
        n_taken = min(n, self._came - self._taken)
        self._taken += n_taken
        return n_taken

    def _as_rows(self, more: list[Row], first: int) -> list[Row]:
        rows = [as_row(row) for row in more]
        for position, row in enumerate(rows, first):
            check_row(row, self.argument, self.name_of(position) if position else "its first row")
        return rows
