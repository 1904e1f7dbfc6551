"""Text files as a table with one column: a row for each line."""

from collections.abc import Iterator

import pyarrow as pa

from .encodings import open_text
from .tables import Table, batched

_TEXT = "text"


class TextTable(Table):
    """Text files, a row for each line, without line ends."""

    def schema(self) -> pa.Schema:
        return pa.schema({_TEXT: pa.string()})

    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        for file, encoding in zip(self.files, self.plan.encodings, strict=True):
            with open_text(file, encoding, newline=None) as text:
                for lines in batched(iter(text)):
                    yield pa.record_batch([pa.array([line.rstrip("\n") for line in lines], pa.string())], schema=schema)
