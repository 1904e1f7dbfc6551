"""Parquet files as a table."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .data_file import DataFile
from .tables import BATCH, Table, check_columns


class ParquetTable(Table):
    """Parquet files. Their columns keep their types, and features that `datasets` has stored, such as class names."""

    def schema(self) -> pa.Schema:
        schemas = []
        for file in self.files:
            with _opened(file) as parquet:
                if parquet.metadata.num_rows == 0:
                    raise file.error("it has no rows", "Give a file with rows.")
                schemas.append(parquet.schema_arrow)
                _check_names(file, parquet.schema_arrow.names)
        check_columns([(file, schema.names) for file, schema in zip(self.files, schemas, strict=True)])
        first = schemas[0]
        for file, schema in zip(self.files[1:], schemas[1:], strict=True):
            for field in schema:
                expected = first.field(field.name).type
                if _plain(field.type) != _plain(expected):
                    raise file.error(
                        f"column {field.name!r} is {field.type}, but {expected} in {str(self.files[0].path)!r}",
                        "Write both files with one type.",
                    )
        plain = [field.with_type(_plain(field.type)) for field in first]
        return pa.schema(plain, first.metadata)

    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        for file in self.files:
            with _opened(file) as parquet:
                for batch in parquet.iter_batches(BATCH):
                    yield batch.select(schema.names).cast(schema)


def _plain(type_: pa.DataType) -> pa.DataType:
    """Return a type, but the usual one for text: pandas writes large strings."""
    return pa.string() if pa.types.is_large_string(type_) else type_


@contextmanager
def _opened(file: DataFile) -> Iterator[pq.ParquetFile]:
    with file.open() as stream:
        try:
            with pq.ParquetFile(_seekable(file, stream)) as parquet:
                yield parquet
        except (pa.ArrowException, OSError) as error:
            raise file.error(
                f"it is not a sound Parquet file: {str(error).rstrip('.')}", "Write it again, or copy it again."
            ) from error


def _seekable(file: DataFile, stream: Any) -> Any:
    return stream if file.path.suffix.lower() == file.suffix else pa.BufferReader(stream.read())


def _check_names(file: DataFile, names: list[str]) -> None:
    file.check_unique(names)
    if "" in names:
        raise file.error(f"column {names.index('') + 1} has no name", "Name it.")
