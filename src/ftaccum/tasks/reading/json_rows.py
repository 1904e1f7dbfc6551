"""Rows of JSON and JSON-lines files, each with its place in the file."""

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import listed
from .column_types import kind_of
from .data_file import DataFile
from .encodings import open_text

Placed = tuple[str, dict[str, Any]]  # where a row is, such as "line 3", and the row

_EACH = 'Each line must be one JSON object, such as {"text": "good", "label": 1}'
_FORMS = (
    'A JSON file is a list of objects, an object with one list of rows, such as {"data": [...]}, or an object of '
    'columns, such as {"text": [...], "label": [...]}'
)
_SHOWN = 6


def json_rows(file: DataFile, encoding: str, split: str) -> Iterator[Placed]:
    """Yield the rows of a file, whatever its suffix: JSON lines if its first line is a whole object, else a document.

    Args:
        split: the list of rows to take if a document has several, such as {"train": [...], "test": [...]}.

    Raises:
        DataError: for a syntax error, with its line and column; for a line or an element that is no object; and for a
            document that has no rows, or several lists of rows.
    """
    first, has_more = _first_line(file, encoding)
    if first is None:
        raise file.empty()
    is_object = first.startswith("{") and _parses(first)
    is_document = first.startswith("[") or (file.kind == "JSON" and not (is_object and has_more))
    yield from _documents_rows(file, encoding, split) if is_document else _lines(file, encoding)


def _first_line(file: DataFile, encoding: str) -> tuple[str | None, bool]:
    """Return the first line with text, and whether there is another; None if there is no text."""
    with open_text(file, encoding, newline=None) as text:
        lines = list(itertools.islice(filter(None, map(str.strip, text)), 2))
    return (lines[0] if lines else None), len(lines) > 1


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _lines(file: DataFile, encoding: str) -> Iterator[Placed]:
    with open_text(file, encoding, newline=None) as text:
        for n, line in enumerate(text, 1):
            if not line.strip():
                continue
            where = f"line {n}"
            try:
                row = json.loads(line.rstrip())
            except ValueError as error:
                column = getattr(error, "colno", 1)
                raise file.error(
                    f"it is not JSON: {getattr(error, 'msg', error)}", f"{_EACH}.", f"{where}, column {column}"
                ) from error
            except RecursionError as error:
                raise file.error("it is nested too deeply", "Flatten it.", where) from error
            if not isinstance(row, dict):
                raise file.error(f"it is {kind_of(row)} instead of an object", f"{_EACH}.", where)
            yield where, row


def _documents_rows(file: DataFile, encoding: str, split: str) -> Iterator[Placed]:
    with open_text(file, encoding, newline=None) as text:
        try:
            document = json.loads(text.read())
        except json.JSONDecodeError as error:
            raise file.error(
                f"it is not JSON: {error.msg}", f"Fix it. {_FORMS}.", f"line {error.lineno}, column {error.colno}"
            ) from error
        except RecursionError as error:
            raise file.error("it is nested too deeply", "Flatten it.") from error
    yield from _placed(file, _rows_of(file, document, split))


def _placed(file: DataFile, rows: list[Any]) -> Iterator[Placed]:
    for n, row in enumerate(rows):
        where = f"row {n}"
        if not isinstance(row, dict):
            raise file.error(f"it is {kind_of(row)} instead of an object", f"{_FORMS}.", where)
        yield where, row


def _rows_of(file: DataFile, document: Any, split: str) -> list[Any]:
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        raise file.error(f"it holds {kind_of(document)}", f"{_FORMS}.")
    lists = {name: value for name, value in document.items() if isinstance(value, list)}
    tables = [name for name, value in lists.items() if value and all(isinstance(row, dict) for row in value)]
    if len(tables) == 1 and len(lists) == 1:
        return document[tables[0]]
    if split in tables:
        return document[split]
    if lists and len(lists) == len(document) and len(tables) < len(lists):
        return _columns_as_rows(file, lists)
    if len(tables) > 1:
        raise file.error(
            f"it has several lists of rows ({listed([*map(repr, tables)], _SHOWN)}), and none is {split!r}",
            "Put one of them in a file of its own.",
        )
    if not lists and document:
        return [document]
    raise file.error(
        f"it is an object with {', '.join(map(repr, itertools.islice(document, _SHOWN))) or 'nothing in it'}, and not "
        "rows",
        f"{_FORMS}.",
    )


def _columns_as_rows(file: DataFile, columns: Mapping[str, list[Any]]) -> list[Any]:
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        counted = ", ".join(f"{name!r} {n}" for name, n in itertools.islice(lengths.items(), _SHOWN))
        raise file.error(f"its columns have different lengths ({counted})", "Give all columns one value for each row.")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
