"""CSV and TSV files as a table."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import pyarrow as pa

from ...runtime.log import logger
from .cell_kinds import TEXT, WORDS, arrow_type, as_array, first_other, kind_of_type, widened
from .delimited import Delimited, no_name, open_delimited
from .tables import Table, batched, check_columns

_INDEX = ""  # the name that pandas gives a column of row numbers
_MANY = 5  # numbers before the first cell that is none, from which on a message says so


class CsvTable(Table):
    """CSV or TSV files. Only empty cells are missing values: NA, null and None are text."""

    @cached_property
    def _opened(self) -> list[Delimited]:
        pairs = zip(self.files, self.plan.encodings, strict=True)
        opened = [open_delimited(file, encoding, self.plan.delimiter) for file, encoding in pairs]
        check_columns([(each.file, each.names) for each in opened])
        return opened

    def schema(self) -> pa.Schema:
        names = self._opened[0].names
        kinds = {name: TEXT if name in self.plan.text_columns else "" for name in names}
        for opened in self._opened:
            n_before, doubtful = 0, []
            for batch in self.head(batched(opened.records())):
                columns = dict(zip(opened.names, zip(*(cells for _, cells in batch), strict=True), strict=True))
                for name, cells in columns.items():
                    kinds[name], before = widened(kinds[name], cells), kinds[name]
                    if kinds[name] == TEXT != before:
                        self._log_text(opened, name, before, cells, [line for line, _ in batch], n_before)
                n_before += len(batch)
                doubtful += [line for line, cells in batch if opened.may_hold_rows(cells)]
            if doubtful:
                self._warn_of_rows_in_fields(opened, doubtful)
        if _INDEX in kinds:
            self._check_index(kinds.pop(_INDEX))
        return pa.schema({name: arrow_type(kind) for name, kind in kinds.items()})

    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        for opened in self._opened:
            places = [opened.names.index(name) for name in schema.names]
            for batch in batched(opened.records()):
                columns = list(zip(*(cells for _, cells in batch), strict=True))
                arrays = []
                for place, field in zip(places, schema, strict=True):
                    kind, cells = kind_of_type(field.type), columns[place]
                    if self.plan.is_stream and (n := first_other(kind, cells)) is not None:
                        raise self._other(opened, field.name, kind, cells[n], batch[n][0])
                    arrays.append(as_array(kind, cells))
                yield pa.record_batch(arrays, schema=schema)

    def _check_index(self, kind: str) -> None:
        first = self._opened[0]
        if kind != "int" or len(first.names) == 1:
            raise no_name(first.file, 1, f"line {first.header_line}")
        logger.info(
            f"`{first.file.argument}` {str(first.file.path)!r}: the first column has no name and numbers the rows. It "
            "is left out."
        )

    def _warn_of_rows_in_fields(self, opened: Delimited, lines: Sequence[int]) -> None:
        n = f"{len(lines)} quoted field{'s contain' if len(lines) > 1 else ' contains'}"
        logger.warning(
            f"`{opened.file.argument}` {str(opened.file.path)!r}: {n} tabs and line ends (the first is in the row from "
            f"line {lines[0]} on). If these are rows, the file quotes no fields, and a quote in its texts joined them. "
            r"Save it with quotes: `pandas.read_csv(FILE, sep='\t', quoting=3).to_csv(FILE, sep='\t', index=False)`."
        )

    def _log_text(
        self, opened: Delimited, name: str, kind: str, cells: Sequence[str], lines: Sequence[int], n_before: int
    ) -> None:
        """Log that a column is text, if it began with numbers: its user may not expect it."""
        kind = kind or widened("", cells[:_MANY])
        n = first_other(kind, cells)
        if kind in ("int", "float") and n is not None and n_before + n >= _MANY:
            n = first_other("float", cells) or n
            logger.info(
                f"`{opened.file.argument}` {str(opened.file.path)!r}: column {name!r} is text, because it has "
                f"{cells[n]!r} in line {lines[n]}. Leave a cell empty if its number is missing."
            )

    def _other(self, opened: Delimited, name: str, kind: str, cell: str, line: int) -> Exception:
        return opened.file.error(
            f"column {name!r} has {cell!r}, but it has {WORDS[kind]} in the first rows, which decide",
            "Fix the cell, or read the file without `--streaming`.",
            f"line {line}",
        )
