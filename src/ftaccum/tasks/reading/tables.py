"""Files of one kind as one table: its columns with their types, and its rows batch by batch."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa

from .data_file import DataFile

T = TypeVar("T")
BATCH = 1000  # rows of a record batch: what one access to a row reads
HEAD = 10  # batches that decide the types of a stream


@dataclass(frozen=True)
class ReadingPlan:
    """The options of reading some files of one kind.

    Attributes:
        delimiter: of CSV files; None to recognize it.
        encodings: the encoding of each file.
        split: the part to take from a file that has several.
        text_columns: CSV columns that are text, even if all cells are numbers.
        is_stream: whether only the first rows decide the types of columns. Later rows are checked as they are read.
    """

    delimiter: str | None
    encodings: tuple[str, ...]
    split: str
    text_columns: tuple[str, ...] = ()
    is_stream: bool = False


class Table(ABC):
    """The rows of files of one kind."""

    def __init__(self, files: Sequence[DataFile], plan: ReadingPlan) -> None:
        self.files, self.plan = tuple(files), plan

    @abstractmethod
    def schema(self) -> pa.Schema:
        """Return the columns and their types.

        Raises:
            DataError: if the files have no rows, or a fault. The rows of a stream after its head are not checked.
        """

    @abstractmethod
    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """Yield the rows.

        Raises:
            DataError: for a row with a fault. It names the file and the place.
        """

    def head(self, items: Iterator[T]) -> Iterator[T]:
        """Return the batches that decide the types: all, or the first ones of a stream."""
        return itertools.islice(items, HEAD) if self.plan.is_stream else items


def batched(items: Iterator[T]) -> Iterator[list[T]]:
    while batch := list(itertools.islice(items, BATCH)):
        yield batch


def check_columns(named: Sequence[tuple[DataFile, Sequence[str]]]) -> None:
    """Refuse files that do not have the same columns.

    Raises:
        DataError: naming the first file and column that differ.
    """
    first, names = named[0]
    remedy = "Give all files the same columns, or drop the column."
    for file, others in named[1:]:
        if missing := [name for name in names if name not in others]:
            raise file.error(f"it has no column {missing[0]!r}, which {str(first.path)!r} has", remedy)
        if more := [name for name in others if name not in names]:
            raise file.error(f"it has a column {more[0]!r}, which {str(first.path)!r} does not have", remedy)
