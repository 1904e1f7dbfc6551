"""A data file: its kind, its decompressed bytes, and errors that name it."""

import bz2
import gzip
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...errors import DataError

KINDS = {
    ".csv": "CSV", ".tsv": "TSV", ".json": "JSON", ".jsonl": "JSON lines", ".ndjson": "JSON lines",
    ".parquet": "Parquet", ".txt": "text",
}  # fmt: skip
_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: pa.input_stream(str(path), compression="zstd"),
}
ALLOWED = f"{', '.join(KINDS)}, each also with {', '.join(_OPENERS)} after it"

# First bytes of files with a wrong name: what they are, and what to do.
_RENAME = "Give it the suffix that it should have."
_TABLE = "Save the sheet as CSV first."
_ARCHIVE = "Unpack it first."
_SIGNATURES = {
    b"PAR1": ("a Parquet file", _RENAME),
    b"ARROW1": ("an Arrow file", "Save its rows as Parquet first."),
    b"PK\x03\x04": ("a zip archive or an Excel sheet (.xlsx)", f"{_ARCHIVE[:-1]}, or save the sheet as CSV."),
    b"\xd0\xcf\x11\xe0": ("an Excel sheet (.xls)", _TABLE),
    b"\x1f\x8b": ("compressed with gzip", "Add .gz to its name."),
    b"BZh": ("compressed with bzip2", "Add .bz2 to its name."),
    b"\xfd7zXZ": ("compressed with xz", "Add .xz to its name."),
    b"\x28\xb5\x2f\xfd": ("compressed with Zstandard", "Add .zst to its name."),
    b"%PDF": ("a PDF", "Extract its text first."),
    b"SQLite format 3": ("an SQLite database", "Export the table as CSV first."),
    b"version https://git-lfs": ("a pointer of Git LFS, not the file itself", "Run `git lfs pull`."),
    b"<!doctype html": ("a web page", "Download the file itself."),
    b"<html": ("a web page", "Download the file itself."),
}
_LONGEST = max(map(len, _SIGNATURES))


@dataclass(frozen=True)
class DataFile:
    """A file of rows that a user named.

    Attributes:
        argument: the argument that named it, for messages.
    """

    path: Path
    argument: str

    @property
    def suffix(self) -> str:
        """The suffix that decides the kind: the last one, or the one before it if the file is compressed."""
        suffixes = self.path.suffixes
        if self._compression:
            suffixes = suffixes[:-1]
        return suffixes[-1].lower() if suffixes else ""

    @property
    def kind(self) -> str:
        """Its kind, such as "CSV", by its suffix; empty if the suffix is unknown."""
        return KINDS.get(self.suffix, "")

    @property
    def _compression(self) -> str:
        last = self.path.suffix.lower()
        return last if last in _OPENERS else ""

    def error(self, reason: str, remedy: str, where: str = "") -> DataError:
        """Return an error that names the file.

        Args:
            reason: what is wrong, without a full stop.
            remedy: what to do: one or more sentences.
            where: the line or row, such as "line 3".
        """
        place = f", {where}" if where else ""
        return DataError(f"`{self.argument}` {str(self.path)!r}{place}: {reason}. {remedy}")

    def empty(self) -> DataError:
        return self.error("the file is empty", "Give a file with rows.")

    def check_unique(self, names: Sequence[str], where: str = "") -> None:
        """Raise DataError if two columns have the same name."""
        for name, n_times in Counter(names).most_common(1):
            if n_times > 1:
                raise self.error(f"{n_times} columns have the name {name!r}", "Give each column another name.", where)

    @contextmanager
    def open(self) -> Iterator[Any]:
        """Open the file for reading its bytes, decompressed.

        Raises:
            DataError: if the file cannot be opened or read, or if its compressed data are damaged.
        """
        try:
            with _OPENERS.get(self._compression, lambda path: path.open("rb"))(self.path) as file:
                yield file
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            reason = (getattr(error, "strerror", None) or str(error)).rstrip(".")
            if not self._compression or getattr(error, "errno", None) is not None:
                raise self.error(reason, "Check the path and its permissions.") from error
            raise self.error(
                f"its {self._compression} data are damaged or cut off: {reason}",
                f"Copy or download it again. If it is not compressed, remove {self._compression} from its name.",
            ) from error

    def check_signature(self) -> None:
        """Refuse a file whose first bytes belong to another kind.

        Raises:
            DataError: with the kind that it seems to be.
        """
        with self.open() as file:
            start = file.read(_LONGEST)
        for signature, (found, remedy) in _SIGNATURES.items():
            if start.lower().startswith(signature.lower()) and (signature, self.kind) != (b"PAR1", "Parquet"):
                raise self.error(f"this is {found}, not a {self.kind} file", remedy)

    def size(self) -> int:
        with suppress(OSError):
            return self.path.stat().st_size
        return 0
