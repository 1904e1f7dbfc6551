"""JSON and JSON-lines files as a table."""

from collections.abc import Iterator, Sequence

import pyarrow as pa

from .column_types import JSON, as_array, final_type, first_of_another_kind, kind_of, merged, type_of
from .data_file import DataFile
from .json_rows import Placed, json_rows
from .tables import Table, batched, check_columns

_CONVERT = "Convert it, so that a column has one type in all rows."
_UNFIT = (pa.ArrowException, ValueError, TypeError, OverflowError)  # what pyarrow raises for values it cannot store


class JsonTable(Table):
    """JSON files. A row without a key has null there. Lists and objects that differ from row to row are kept."""

    def schema(self) -> pa.Schema:
        kinds: dict[str, str | None] = {}
        types: dict[str, pa.DataType] = {}
        named = []
        for file, encoding in zip(self.files, self.plan.encodings, strict=True):
            names: dict[str, None] = {}
            for batch in self.head(batched(json_rows(file, encoding, self.plan.split))):
                for name in dict.fromkeys(name for _, row in batch for name in row):
                    names[name] = None
                    values = [row.get(name) for _, row in batch]
                    kinds[name] = self._one_kind(file, name, values, batch, kinds.get(name))
                    found = self._type(file, name, values, batch)
                    types[name] = merged(types.get(name, pa.null()), found)
            if not names:
                raise file.error("it has no rows", "Give a file with rows.")
            if "" in names:
                raise file.error("a column has no name", 'Name it: the key must not be "".')
            named.append((file, list(names)))
        check_columns(named)
        return pa.schema({name: self._stored(found) for name, found in types.items()})

    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        for file, encoding in zip(self.files, self.plan.encodings, strict=True):
            for batch in batched(json_rows(file, encoding, self.plan.split)):
                if self.plan.is_stream:
                    self._check_stream(file, batch, schema)
                arrays = []
                for field in schema:
                    values = [row.get(field.name) for _, row in batch]
                    try:
                        arrays.append(as_array(values, field.type))
                    except _UNFIT as error:
                        raise self._unfit(file, field.name, values, batch, field.type, error) from error
                yield pa.record_batch(arrays, schema=schema)

    def _stored(self, found: pa.DataType) -> pa.DataType:
        """Return the type to store a column with. Later rows of a stream may have objects of any form."""
        is_open = self.plan.is_stream and (pa.types.is_nested(found))
        return JSON if is_open else final_type(found)

    def _one_kind(
        self, file: DataFile, name: str, values: Sequence[object], batch: Sequence[Placed], kind: str | None
    ) -> str | None:
        n, kind = first_of_another_kind(values, kind)
        if n is not None:
            value, where = values[n], batch[n][0]
            raise file.error(
                f"column {name!r} is {kind_of(value)} here, but {kind} in the rows before", _CONVERT, where
            )
        return kind

    def _type(self, file: DataFile, name: str, values: Sequence[object], batch: Sequence[Placed]) -> pa.DataType:
        try:
            return type_of(values)
        except _UNFIT as error:
            raise self._unfit(file, name, values, batch, None, error) from error

    def _unfit(
        self,
        file: DataFile,
        name: str,
        values: Sequence[object],
        batch: Sequence[Placed],
        type_: pa.DataType | None,
        error: Exception,
    ) -> Exception:
        n, reason = _first_unfit(values, type_) or (0, str(error).rstrip("."))
        return file.error(f"column {name!r} cannot be stored: {reason}", _CONVERT, batch[n][0])

    def _check_stream(self, file: DataFile, batch: Sequence[Placed], schema: pa.Schema) -> None:
        for where, row in batch:
            if more := [name for name in row if name not in schema.names]:
                raise file.error(
                    f"it has a column {more[0]!r}, which the first rows do not have",
                    "Give all rows the same columns, or read the file without `--streaming`.",
                    where,
                )


def _first_unfit(values: Sequence[object], type_: pa.DataType | None) -> tuple[int, str] | None:
    """Return the position of the first value that Arrow cannot store, and the reason; None if it can store each."""
    for n, value in enumerate(values):
        try:
            pa.array([value], type_)
        except _UNFIT as error:
            return n, str(error).rstrip(".")
    return None
