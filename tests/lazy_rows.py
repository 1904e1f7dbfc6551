"""Rows that are made on access, so that nothing can be read from them in advance."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset


class LazyRows(Dataset[Any]):
    """A torch `Dataset` around a list of rows."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._rows[index]
