"""Turn tables, columns, and rows with an extra dimension into rows that `Rows` takes."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
from datasets import Dataset, DatasetDict
from torch import Tensor

from ..errors import DataError
from .row import Row

_FEW = 8  # rows to look at, to find out their form


class ChangedRows:
    """Rows of a source that are changed each time they are fetched."""

    def __init__(self, source: Any, change: Callable[[Row, int], Row]) -> None:
        """Args:
        change: returns the new row, given the old one and its index.
        """
        self._source, self._change = source, change

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Row:
        return self._change(self._source[index], index)


def by_row(data: Any, argument: str) -> Any:
    """Return a DataFrame, an Arrow table or a dict of columns as rows, and anything else as it is.

    Raises:
        DataError: if the columns of a dict have unequal lengths.
    """
    if isinstance(data, pd.DataFrame):
        return _rows_of_frame(data)
    if isinstance(data, pa.Table):
        return Dataset(data)
    return _rows_of_columns(data, argument) if _are_columns(data) else data


def without_leading_dimension(data: Any, n_rows: int) -> Any:
    """Return the rows with token ids of shape (length,) if all have the shape (1, length), as from a tokenizer with
    `return_tensors="pt"`. If fetching a row computes it, look at a few only."""
    if isinstance(data, Dataset) and data.format["type"] != "custom":
        return _unnested_table(data)
    if isinstance(data, list):
        return [unnested(row) for row in data] if all(map(is_nested, data)) else data
    few = min(_FEW, n_rows)
    if all(is_nested(data[i * n_rows // few]) for i in range(few)):
        return ChangedRows(data, lambda row, _: unnested(row))
    return data


def is_nested(row: Row) -> bool:
    """Return whether a row's token ids have a leading dimension of size 1."""
    return isinstance(row, Mapping) and _has_leading_one(row.get("input_ids"))


def unnested(row: Row) -> Row:
    """Return a row whose columns have no leading dimension of size 1."""
    return {name: value[0] if _has_leading_one(value) else value for name, value in row.items()}


def _has_leading_one(value: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 1 and value.shape[0] == 1
    return (
        isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], list | tuple | Tensor | np.ndarray)
    )


def _unnested_table(table: Dataset) -> Dataset:
    columns = table.with_format("arrow")[:]
    nested = [name for name in table.column_names if _is_nested_column(columns[name])]
    if "input_ids" not in nested:
        return table

    def unnest(batch: Mapping[str, list]) -> dict[str, list]:
        return {name: [value[0] for value in batch[name]] for name in nested}

    formatted = table.format
    return table.with_format(None).map(unnest, batched=True, remove_columns=nested).with_format(**formatted)


def _is_nested_column(column: pa.ChunkedArray) -> bool:
    if not (pa.types.is_list(column.type) and pa.types.is_list(column.type.value_type)):
        return False
    lengths = pyarrow.compute.min_max(pyarrow.compute.list_value_length(column)).as_py()
    return lengths == {"min": 1, "max": 1}


def _rows_of_frame(frame: pd.DataFrame) -> Any:
    try:
        return Dataset.from_pandas(frame, preserve_index=False)
    except (pa.ArrowException, TypeError, ValueError):  # columns of tensors
        return frame.to_dict("records")


def _are_columns(data: Any) -> bool:
    """Return whether data are a dict of columns, and not one row or a dict of splits."""
    if not isinstance(data, Mapping) or isinstance(data, DatasetDict) or not data:
        return False
    return all(map(_is_column, data.values()))


def _is_column(value: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 0
    return isinstance(value, list | tuple | pd.Series) and not any(isinstance(item, Mapping) for item in value[:1])


def _rows_of_columns(columns: Mapping[str, Any], argument: str) -> list[Row]:
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        named = ", ".join(f"{n} in {name!r}" for name, n in lengths.items())
        raise DataError(
            f"`{argument}` is a dict of columns of unequal lengths: {named}. Give each column a value for every row."
        )
    return [dict(zip(columns, row, strict=True)) for row in zip(*map(list, columns.values()), strict=True)]
