"""Limits on the numbers that a model looks up in its embedding tables, as a forward pass shows them."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .item_counts import Batch

# A column of a batch, and one position of its rows if the model looks up that position separately.
Place: TypeAlias = tuple[str, int | None]


@dataclass(frozen=True)
class EmbeddingLimits:
    """The limits that a model's embedding tables set.

    Attributes:
        sizes: for each column, the number of entries in the table that the model looks its numbers up in.
        longest: the most tokens of a row for which there are positions; None if the model used no position table.
    """

    sizes: Mapping[Place, int] = field(default_factory=dict)
    longest: int | None = None


class _Lookups(TorchFunctionMode):
    """A mode that records which numbers are looked up in embedding tables, and the sizes of the tables."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, int]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.embedding:
            numbers = args[0] if args else kwargs["input"]
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self.seen.append((numbers, weight.shape[0]))
        return function(*args, **kwargs)


def find_embedding_limits(forward_pass: Callable[[], object], row: Batch) -> EmbeddingLimits:
    """Run a forward pass of one row, and return the sizes of the embedding tables that it looks its columns up in.

    If the pass fails, the lookups before the failure still count.
    """
    with _Lookups() as lookups, suppress(Exception):
        forward_pass()
    sizes: dict[Place, int] = {}
    columns = columns_of(row)
    ids = columns.get("input_ids")
    longest: list[int] = []
    for numbers, size in lookups.seen:
        places = [place for name, column in columns.items() for place in _places(numbers, name, column)]
        for place in places:
            sizes[place] = min(size, sizes.get(place, size))
        if not places and ids is not None and (first := _first_position(numbers)) is not None:
            longest += [size - first] if numbers.shape[-1] == ids.shape[-1] else []
    return EmbeddingLimits(sizes, min(longest, default=None))


def columns_of(batch: Batch) -> dict[str, Tensor]:
    """Return the tensors of a batch by name. Those of a tuple are named `inputs` and `targets`."""
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    inputs, targets = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (batch, None)
    named = dict(inputs) if isinstance(inputs, Mapping) else {"inputs": inputs}
    return {name: value for name, value in {**named, "targets": targets}.items() if isinstance(value, Tensor)}


def _places(numbers: Tensor, name: str, column: Tensor) -> list[Place]:
    """Return which part of a column these numbers are; an empty list if they are no view of it."""
    if numbers.untyped_storage().data_ptr() != column.untyped_storage().data_ptr():
        return []
    if numbers.numel() == column.numel():
        return [(name, None)]
    if column.ndim == 2 and numbers.numel() == len(column):
        return [(name, int(numbers.storage_offset()) - int(column.storage_offset()))]
    return []


def _first_position(numbers: Tensor) -> int | None:
    """Return the first number if the numbers are consecutive, as positions are; else None."""
    row = numbers.reshape(-1)
    if not 1 < len(row) == numbers.shape[-1] or not bool((row.diff() == 1).all()):
        return None
    return int(row[0])
