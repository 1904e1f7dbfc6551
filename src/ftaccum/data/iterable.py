"""A stream as rows. The main process alone reads it, and sends its rows to all processes."""

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
from ..settings.recipe import Recipe
from .dataset import Report, Rows, Step
from .encode_table import Encode
from .forms import is_nested, unnested
from .row import Row, as_row, check_row, length_of

LOOKED_AT = 256  # rows to check before training
_DRAWS = 0x57  # separates the random numbers of a stream from other uses of the seed


def is_stream(data: Any) -> bool:
    """Return whether data can only be read in order, not by position."""
    return isinstance(data, StreamingDataset | torch.utils.data.IterableDataset)


def is_split(stream: Any) -> bool:
    """Return whether a stream of `datasets` gives each process another part of its rows."""
    split = getattr(stream, "_distributed", None)
    return split is not None and split.world_size > 1


@contextmanager
def open_stream(data: Any, seed: int, process_group: ProcessGroup) -> Iterator["Stream | None"]:
    """Open training data as a stream; yield None if they are not one. All processes must call it."""
    if not is_stream(data):
        yield None
        return
    with single_process(process_group.size) as as_single:
        yield Stream(data, "train_data", seed, process_group, as_single)


class Stream:
    """A stream that the main process reads for all processes.

    No row is lost or repeated, however the stream shuffles its rows or splits them between processes. Its random
    numbers, from the generators of Python, NumPy and torch, follow the seed. Outside of it, these keep their state.
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
        argument: the name of the argument that the stream came from, for messages.
        as_single: returns a context in which this process seems to be the only one.
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
        """Return up to `n` more rows of an epoch, on all processes; fewer only if it has ended.

        Raises:
            DataError: if the stream or one of the steps raises; on all processes.
        """
        try:
            return self._process_group.run_on_main(lambda: self._rows_on_main(epoch, n))
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"Rows of `{self.argument}` cannot be sent to other processes: {error!r}. Make them of tensors, "
                "arrays, numbers and text."
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
                f"`{self.argument}` cannot be read further, after {self._n_read} rows: {error!r}. Fix what it reads "
                "from, or make it skip what cannot be read."
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
    """The rows of a stream, in the order in which they arrive, over all epochs.

    The first rows are read at once, to be checked, and `len` counts these alone. They are trained on in their turn,
    like all others. Rows of finished windows are dropped.
    """

    def __init__(self, stream: Stream) -> None:
        """Raises:
        DataError: if the stream has no rows, or has items that are not rows.
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
        return f"`{self.argument}`, judging by its first {len(self)} rows,"

    @property
    def if_none_is_fit(self) -> str:
        return (
            f" Only these {len(self)} rows are checked before training. If later ones are usable, shuffle the stream "
            "(`.shuffle(buffer_size=10_000)`), or make it begin with such a row."
        )

    def find_draws(self) -> None:
        """Do nothing: the rows were read already, so fetching them draws nothing."""

    def fetch(self, positions: Sequence[int], seed: Sequence[int] = ()) -> list[Row]:  # noqa: ARG002
        return [self._held[position] for position in positions]

    @property
    def are_endless(self) -> bool:
        return len(self) == LOOKED_AT

    @property
    def are_token_ids(self) -> bool:
        return self._are_token_ids

    def lengths(self, positions: Sequence[int] | None = None) -> list[int]:
        """Return the lengths of the rows at these positions; None: of the first rows."""
        return [length_of(row) for row in self.fetch(range(len(self)) if positions is None else positions)]

    def column(self, name: str) -> None:
        """Return None: rows are checked as they arrive."""

    def longest(self, limit: int | None) -> int:
        """Return the length of the longest row that could arrive."""
        return limit or sys.maxsize

    def on_arrival(self, step: Step) -> None:
        """Apply a step to the rows that were read, and to all that follow.

        Raises:
            DataError: if the step raises. For a later row, the error comes when the row is read.
        """
        self._held = dict(enumerate(step(list(self._held.values()), 0)))
        self._stream.steps.append(step)

    def encoded(self, encode: Encode, columns: Sequence[str], n_processes: int = 1) -> "StreamRows":  # noqa: ARG002
        """Encode the rows that were read, and all that follow, in this process."""

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
        """Convert a column of the rows that were read, and of all that follow."""

        def convert_more(more: list[Row], first: int) -> list[Row]:
            names = [f"In `{self.argument}`, {self.name_of(position)}" for position in range(first, first + len(more))]
            return [{**row, name: convert(row.get(name), of)} for row, of in zip(more, names, strict=True)]

        self.on_arrival(convert_more)
        return self

    def take_out(self, columns: Sequence[str], report: Report | None) -> "StreamRows":
        """Take columns out of the rows that were read, and of all that follow, and report them."""

        def take_out_more(more: list[Row], first: int) -> list[Row]:
            if report is not None:
                report({name: [row[name] for row in more] for name in columns}, first)
            return [{name: value for name, value in row.items() if name not in columns} for row in more]

        self.on_arrival(take_out_more)
        return self

    def plan(self, recipe: Recipe, batch_sizes: BatchSizes, n_validation_rows: int) -> StreamPlan:
        """Return the plan of a run over the stream."""
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
        """Get up to `n` more rows of an epoch for training, and return how many there are: fewer only if it has ended.
        All processes must call it with the same arguments.

        Args:
            needed_from: rows before this position are dropped.
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
