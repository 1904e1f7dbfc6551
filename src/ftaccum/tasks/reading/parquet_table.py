"""Parquet files as a table."""

import json
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
            self._check_classes(file, schema, first)
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

    def _check_classes(self, file: DataFile, schema: pa.Schema, first: pa.Schema) -> None:
        """Raise DataError if the numbers of a column stand for other classes than in the first file."""
        known = _classes(first)
        for name, classes in _classes(schema).items():
            if classes != known[name]:
                raise file.error(
                    f"column {name!r} has {classes}, but {known[name]} in {str(self.files[0].path)!r}",
                    "Write both files with the same classes.",
                )

    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        for file in self.files:
            with _opened(file) as parquet:
                for batch in parquet.iter_batches(BATCH):
                    yield batch.select(schema.names).cast(schema)


def _classes(schema: pa.Schema) -> dict[str, str]:
    """Return the features of columns that have named classes, as `datasets` has stored them; empty texts for others."""
    stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = stored.get("info", {}).get("features") or {}
    shown = {name: json.dumps(feature) for name, feature in features.items()}
    return {name: shown[name] if '"ClassLabel"' in shown.get(name, "") else "" for name in schema.names}


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
