"""Turn rows into a table of columns."""

import bisect
import math
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset

from ..errors import DataError
from .row import Row


def make_table(rows: Sequence[Row], argument: str, name_of: Callable[[int], str]) -> Dataset:
    """Return rows as a table with every column that any of them has.

    Args:
        argument: the name of the argument that the rows came from, for messages.
        name_of: returns how messages name a row.

    Raises:
        DataError: if the rows do not form a table. It names the first row that does not fit the rows before it.
    """
    names = dict.fromkeys(name for row in rows for name in row)

    def table_of(rows: Sequence[Row]) -> Dataset:  # `from_list` takes only the columns of the first row
        return Dataset.from_dict({name: _column(name, rows) for name in names})

    def fault(n: int) -> Exception | None:
        try:
            table_of(rows[:n])
        except Exception as error:
            return error
        return None

    try:
        return table_of(rows)
    except Exception as error:
        first = bisect.bisect_left(range(1, len(rows)), True, key=lambda n: fault(n) is not None)
        raise DataError(
            f"In `{argument}`, {name_of(first)} cannot be put into one table with the rows before it: "
            f"{fault(first + 1)}. Give all rows the same columns, and each column values of one type."
        ) from error


def _column(name: str, rows: Sequence[Row]) -> list[Any]:
    """Return a column of rows, with None for a row without this column, or where pandas has NaN for missing text."""
    values = [row.get(name) for row in rows]
    if not any(isinstance(value, str) for value in values):
        return values
    return [None if isinstance(value, float) and math.isnan(value) else value for value in values]
