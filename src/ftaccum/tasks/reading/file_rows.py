"""The rows of files of one kind, as a data set: stored on disk by their content, or streamed."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, IterableDataset
from datasets.table import MemoryMappedTable

from ...errors import DataError
from .csv_table import CsvTable
from .data_file import DataFile
from .encodings import choose_encoding, scan
from .json_table import JsonTable
from .options import ReadingOptions
from .parquet_table import ParquetTable
from .tables import ReadingPlan, Table
from .text_table import TextTable

_TABLES: dict[str, type[Table]] = {
    "CSV": CsvTable, "TSV": CsvTable, "JSON": JsonTable, "JSON lines": JsonTable, "Parquet": ParquetTable,
    "text": TextTable,
}  # fmt: skip
_VERSION = 2  # of the rows that are made of the same bytes; part of their name on disk
_NAMED = 5  # files
_HEAD_MIB = 1  # of a streamed file, to recognize its encoding


def read_files(
    files: Sequence[DataFile], options: ReadingOptions, split: str, text_columns: Sequence[str]
) -> Dataset | IterableDataset:
    """Return the rows of files of one kind.

    Rows that are not streamed are stored in the cache of `datasets` under a hash of the files' bytes, so that a file
    that was rewritten is read again, whatever its date says.

    Raises:
        DataError: if a file cannot be read. It names the file and the place.
    """
    scans = [scan(file, _HEAD_MIB if options.streaming else None) for file in files]
    is_text = files[0].kind != "Parquet"
    encodings = [
        choose_encoding(file, found, options.encoding) if is_text else ""
        for file, found in zip(files, scans, strict=True)
    ]
    plan = ReadingPlan(options.delimiter, tuple(encodings), split, tuple(text_columns), options.streaming)
    table = _TABLES[files[0].kind](files, plan)
    if options.streaming:
        schema = _with_features(table)
        features = Features.from_arrow_schema(schema)
        return IterableDataset.from_generator(
            _rows_of, features=features, gen_kwargs={"table": table, "schema": schema}
        )
    key = [_VERSION, files[0].kind, [found.digest for found in scans], repr(plan)]
    name = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()
    path = Path(datasets.config.HF_DATASETS_CACHE) / "ftaccum" / name / "rows.arrow"
    if not path.exists():
        _store(table, path)
    info = DatasetInfo(dataset_name=", ".join(file.path.name for file in files[:_NAMED]))  # for the model card
    return Dataset(MemoryMappedTable.from_file(str(path)), info, fingerprint=name)


def _with_features(table: Table) -> pa.Schema:
    """Return the schema of a table as `datasets` writes it, with the features in its metadata."""
    schema = table.schema()
    try:
        return Features.from_arrow_schema(schema).arrow_schema
    except (ValueError, NotImplementedError) as error:
        raise table.files[0].error(
            f"a column has a type that `datasets` does not read: {error}", "Convert the column."
        ) from error


def _store(table: Table, path: Path) -> None:
    """Write the rows of a table. The file appears when it is complete, and processes may write it at the same time."""
    schema, partial = _with_features(table), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        with os.fdopen(handle, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in table.batches(schema):
                writer.write_batch(batch.cast(schema) if batch.schema != schema else batch)
        os.replace(partial, path)
    except OSError as error:
        raise DataError(
            f"The rows of `{table.files[0].argument}` cannot be stored in {str(path.parent)!r}: {error}. Free some "
            "space, or set the environment variable HF_DATASETS_CACHE to another folder."
        ) from error
    finally:
        if partial is not None:
            with suppress(FileNotFoundError):
                os.unlink(partial)


def _rows_of(table: Table, schema: pa.Schema) -> Iterator[dict[str, Any]]:
    for batch in table.batches(schema):
        yield from batch.to_pylist()
