"""Rows that are made when they are asked for, so nothing can be read from them beforehand."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset


class LazyRows(Dataset[Any]):
    """A `Dataset` of torch around a list of rows."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._rows[index]
