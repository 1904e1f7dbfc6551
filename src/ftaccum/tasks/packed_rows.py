"""Tokens of documents, joined and split into rows of one length."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import Dataset

from ..data.text_columns import show
from ..data.text_encoder import TextEncoder
from ..errors import DataError

PACKED_COLUMNS = ("input_ids", "labels", "position_ids")
BLANK = "is_blank"  # a column of encoded documents: whether there is no text


@dataclass(frozen=True)
class DocumentEncoder:
    """A function for `encode_table` that tokenizes texts without a limit.

    Attributes:
        column: the column of the texts.
        argument: the argument that names the rows, for messages.
        end: the token to end each text with; None for none.
    """

    column: str
    argument: str
    tokenizer: Any
    end: int | None

    def __call__(self, table: Mapping[str, list], positions: Sequence[int]) -> dict[str, list]:
        texts = table[self.column]
        for text, position in zip(texts, positions, strict=True):
            if not isinstance(text, str):
                raise DataError(
                    f"In `{self.argument}`, row {position} has {show(text)} instead of text in its column "
                    f"{self.column!r}. Fix or drop the row."
                )
        tokens = TextEncoder(self.tokenizer, None, self.end)([texts])["input_ids"]
        return {"input_ids": tokens, BLANK: [not text.strip() for text in texts]}


def pack(tokens: Dataset, argument: str, length: int) -> Dataset:
    """Return the tokens of all documents in order, in rows of `length` tokens; only the last row may be shorter.

    A row may hold several documents, and a document may continue in the next row. `position_ids` start again at 0 with
    each document and each row. Labels are the tokens themselves. There is no attention mask: without one, models keep
    the documents of a row separate, by their positions.

    Args:
        tokens: `input_ids`, a document per row.

    Raises:
        DataError: if there are no tokens.
    """
    column = tokens.with_format("arrow")[:]["input_ids"]
    ids = pa.compute.list_flatten(column).combine_chunks().cast(pa.int32())
    if not len(ids):
        raise DataError(f"The texts of `{argument}` have no tokens. Check the column of the texts.")
    ends_of_documents = np.cumsum(pa.compute.list_value_length(column).to_numpy())
    offsets = np.append(np.arange(0, len(ids), length), len(ids))  # where rows begin and end
    starts = np.union1d(ends_of_documents[:-1], offsets[:-1])
    positions = np.arange(len(ids)) - np.repeat(starts, np.diff(starts, append=len(ids)))
    columns = {"input_ids": ids, "labels": ids, "position_ids": pa.array(positions.astype(np.int32))}
    return Dataset(pa.table({name: pa.LargeListArray.from_arrays(offsets, columns[name]) for name in PACKED_COLUMNS}))
