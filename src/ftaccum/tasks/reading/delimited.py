"""Records of CSV and TSV files, with the line where each begins."""

import csv
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import listed
from .data_file import DataFile
from .encodings import open_text

DELIMITERS = {",": "','", ";": "';'", "\t": "tab", "|": "'|'"}
_SAMPLE = 100  # records to recognize the delimiter from
_LONGEST_FIELD = 2**31 - 1  # the most that fits in a C long everywhere; the default of 131,072 is too short for texts
_SHOWN = 8  # columns in a message


@dataclass(frozen=True)
class Delimited:
    """A CSV or TSV file whose header was read.

    Attributes:
        names: the columns. The first is "" for the index that pandas writes.
        header_line: the line of the header.
        skips_spaces: whether a space follows each delimiter, also before quotes. It belongs to no field.
    """

    file: DataFile
    encoding: str
    delimiter: str
    names: list[str]
    header_line: int
    skips_spaces: bool = False

    def records(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the line and the cells of each row, without the header.

        Raises:
            DataError: for the first record that is not sound: a number of fields that differs from the header's, or
                quotes that do not match.
        """
        n_names = len(self.names)
        rows = _records(self.file, self.encoding, self.delimiter, skips_spaces=self.skips_spaces)
        for line, cells in itertools.islice(rows, 1, None):
            if len(cells) != n_names:
                raise self._ragged(line, cells)
            yield line, cells

    def may_hold_rows(self, cells: Sequence[str]) -> bool:
        """Return whether a quoted field may be several rows: it contains tabs, which separate the columns, and lines.

        If a file quotes nothing, a quote at the start of a text makes one field of all rows up to the next quote that
        ends a text. Commas are too usual in texts to tell.
        """
        return self.delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in cells)

    def _ragged(self, line: int, cells: Sequence[str]) -> Exception:
        by = named(self.delimiter)
        remedy = (
            f'Put double quotes around fields that contain {by}: "…"'
            if len(cells) > len(self.names)
            else "Add the missing fields, or leave them empty"
        )
        counted = f"{len(cells)} field{'s' * (len(cells) != 1)}"
        header = f"the header has {len(self.names)} ({listed(self.names, _SHOWN)})"
        return self.file.error(
            f"this row has {counted}, but {header}",
            f"{remedy}. If {by} is not what separates the columns, give `--delimiter`.",
            f"line {line}",
        )


def open_delimited(file: DataFile, encoding: str, asked: str | None) -> Delimited:
    """Recognize the delimiter, and read and check the header.

    Args:
        asked: the delimiter that the user gave; None to recognize it.

    Raises:
        DataError: if there is no header or no row, if a column has no name or the name of another, or if the header
            shows that the delimiter is another one.
    """
    delimiter = asked or ("\t" if file.kind == "TSV" else _recognized(file, encoding))
    first = list(itertools.islice(_records(file, encoding, delimiter), 2))
    if not first:
        raise file.empty()
    line, header = first[0]
    skips_spaces = len(header) > 1 and all(name.startswith(" ") for name in header[1:])
    if skips_spaces:
        line, header = next(_records(file, encoding, delimiter, skips_spaces=True))
    names = [name.strip() for name in header]
    _check_header(file, delimiter, names, line)
    if len(first) == 1:
        raise file.error(f"it has a header ({listed(names, _SHOWN)}), but no rows", "Give a file with rows.")
    return Delimited(file, encoding, delimiter, names, line, skips_spaces)


def named(delimiter: str) -> str:
    return DELIMITERS.get(delimiter, repr(delimiter))


def _check_header(file: DataFile, delimiter: str, names: Sequence[str], line: int) -> None:
    where = f"line {line}"
    if len(names) == 1:
        others = [other for other in DELIMITERS if other in names[0] and other != delimiter]
        if others:
            option = "tab" if others[0] == "\t" else repr(others[0])
            raise file.error(
                f"its only column is {names[0]!r}, which contains {named(others[0])}",
                f"If {named(others[0])} separates the columns, give `--delimiter {option}`; otherwise rename the "
                "column.",
                where,
            )
    for n, name in enumerate(names[1:], 2):
        if not name:
            raise no_name(file, n, where)
    file.check_unique(names, where)


def no_name(file: DataFile, column: int, where: str) -> Exception:
    return file.error(
        f"column {column} has no name", "Name it in the header, or delete the column (`to_csv(index=False)`).", where
    )


def _recognized(file: DataFile, encoding: str) -> str:
    """Return the delimiter under which most of the first records have as many fields as the header, if two or more."""
    shares: dict[str, tuple[float, int]] = {}
    for delimiter in DELIMITERS:
        counts = [len(cells) for _, cells in _lenient(file, encoding, delimiter)]
        if counts and counts[0] > 1:
            shares[delimiter] = (counts.count(counts[0]) / len(counts), counts[0])
    return max(shares, key=lambda delimiter: shares[delimiter]) if shares else ","


def _lenient(file: DataFile, encoding: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    return itertools.islice(_records(file, encoding, delimiter, strict=False), _SAMPLE)


def _records(
    file: DataFile, encoding: str, delimiter: str, *, strict: bool = True, skips_spaces: bool = False
) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line and the fields of each record, without blank lines."""
    csv.field_size_limit(_LONGEST_FIELD)
    with open_text(file, encoding) as text:
        reader = csv.reader(text, delimiter=delimiter, strict=strict, skipinitialspace=skips_spaces)
        before = 0
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise _unsound(file, error, delimiter, before + 1) from error
            if cells is None:
                return
            if cells:
                yield before + 1, cells
            before = reader.line_num


def _unsound(file: DataFile, error: Any, delimiter: str, line: int) -> Exception:
    if "end of data" in str(error):
        return file.error(
            'a field begins with a double quote (") that is never closed',
            'Close it. A quote inside a quoted field is written twice: "".',
            f"the record from line {line} on",
        )
    return file.error(
        f"the quotes do not match: {error}",
        f"A field that begins with a double quote must end with one, before {named(delimiter)} or the end of the line; "
        'a quote inside it is written twice: "".',
        f"line {line}",
    )
