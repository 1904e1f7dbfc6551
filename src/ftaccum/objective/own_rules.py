"""Counts for losses that ignore or weight items by a rule of their own.

All are dataclasses, so that processes can send them to each other.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import DataError
from .item_counts import AFTER_SHIFT, TOKEN_COLUMNS, Batch, are_per_token, targets_of
from .prefixed import is_tokens_column

TARGETS = "labels"  # the name of the targets, also of those in a tuple
_MOST_VALUES = 100  # distinct values in a column, to try each as the one that the loss ignores
_MOST_ELEMENTS = 100_000  # numbers in a column that has several per row, and is none of labels
_SHOWN = 6  # weights, in a message


@dataclass(frozen=True)
class Items:
    """The items of a batch before any rule: the labels that are not ignored or, without labels, a column's numbers.

    Attributes:
        column: the column that the rule depends on.
        shifted: whether the first label of a row is no item, because logits predict the next one.
        ignore_index: the label that the loss is known to ignore.
        name: how messages name the items.
    """

    column: str
    shifted: bool
    ignore_index: int
    name: str = "labels"

    def values(self, batch: Batch) -> Tensor:
        """Return the column's value for each item. A single number per row is repeated for each label of the row.

        The items of a column of another shape are its own elements.
        """
        values, targets = column_of(batch, self.column), targets_of(batch)
        if targets is None or values.shape not in (targets.shape, targets.shape[:1]):
            return values.flatten()
        if values.shape != targets.shape:
            values = values.reshape(-1, *[1] * (targets.ndim - 1)).expand_as(targets)
        if self.shifted:
            values, targets = values[:, 1:], targets[:, 1:]
        return values[targets != self.ignore_index]

    def __str__(self) -> str:
        return AFTER_SHIFT if self.shifted else self.name


class Rule(Protocol):
    """A count by a rule that depends on the values of a column.

    Attributes:
        items: the items before the rule.
    """

    @property
    def items(self) -> Items: ...

    def __call__(self, batch: Batch) -> float: ...

    def evidence(self, values_N: Tensor) -> list[float]:
        """Return the values that this rule counts differently than most.

        Args:
            values_N: the values of the items that the rule was found on.
        """

    def may_rest_on_one_row(self, values_N: Tensor) -> bool:
        """Return whether the rule is likely even if only one row has a value that it counts differently.

        Where most rows have values of their own, any of these would explain that a row is left out. So such a value
        must be NaN, infinite, or the smallest or largest of whole numbers, as numbers for missing labels are.
        """


@dataclass(frozen=True)
class WithoutValue:
    """A count of the items whose column does not have this value."""

    items: Items
    value: float

    def __call__(self, batch: Batch) -> int:
        values = self.items.values(batch)
        return int((values == values if self.value != self.value else values != self.value).sum())

    def evidence(self, _: Tensor) -> list[float]:
        return [self.value]

    def may_rest_on_one_row(self, values_N: Tensor) -> bool:
        return not math.isfinite(self.value) or (
            not bool((values_N % 1 > 0).any()) and self.value in (values_N.min().item(), values_N.max().item())
        )

    def __str__(self) -> str:
        return f"{self.items} {_of(self.items.column)}other than {self.value:g}"


@dataclass(frozen=True)
class ColumnSum:
    """A count that adds up a column of weights over the items."""

    items: Items

    def __call__(self, batch: Batch) -> float:
        return float(self.items.values(batch).double().sum())

    def evidence(self, values_N: Tensor) -> list[float]:
        return _unlike_most(values_N, values_N)

    def may_rest_on_one_row(self, _: Tensor) -> bool:
        return True

    def __str__(self) -> str:
        return f"{self.items} weighted by {self.items.column!r}"


@dataclass(frozen=True)
class ValueWeights:
    """A count that adds up the weights that the loss gives to the values of a column, as measured.

    Attributes:
        values: the values, in ascending order.
        weights: the weight of each.
    """

    items: Items
    values: Sequence[float]
    weights: Sequence[float]

    def __call__(self, batch: Batch) -> float:
        found = self.items.values(batch).cpu().double()
        values = torch.tensor(self.values, dtype=torch.float64)
        places = torch.searchsorted(values, found).clamp(max=len(values) - 1)
        if (unknown := values[places] != found).any():
            raise DataError(
                f"The loss weights items by {self.items.column!r}. The check before training measured the weights on a "
                f"few rows, but none of these has the value {found[unknown][0].item():g}. Give "
                "`nn.CrossEntropyLoss(weight=…)` as `loss_fn`, or `count_items`."
            )
        return float(torch.tensor(self.weights, dtype=torch.float64)[places].sum())

    def evidence(self, _: Tensor) -> list[float]:
        return _unlike_most(torch.tensor(self.values), torch.tensor(self.weights))

    def may_rest_on_one_row(self, _: Tensor) -> bool:
        return True

    def __str__(self) -> str:
        pairs = list(zip(self.values, self.weights, strict=True))
        shown = ", ".join(f"{value:g}: {weight:.4g}" for value, weight in pairs[:_SHOWN])
        more = ", …" if len(pairs) > _SHOWN else ""
        return f"{self.items} weighted by {self.items.column!r} ({shown}{more})"


def column_of(batch: Batch, name: str) -> Tensor:
    """Return a column of a batch by name, as `columns_by_name` names it."""
    return columns_by_name(batch)[name]


def items_of(batch: Batch, ignore_index: int) -> list[Items]:
    """Return items for each column that a rule may depend on.

    These are the labels, columns with a number per row or per label, columns of 0 and 1 and, if there are no labels,
    columns with several numbers per row.
    """
    targets, tensors = targets_of(batch), columns_by_name(batch)
    if not tensors:
        return []
    can_shift = are_per_token(targets) and targets.shape[1] > 1
    n_rows = next(iter(tensors.values())).shape[:1]
    found = []
    for name, values in sorted(tensors.items(), key=lambda column: column[0] != TARGETS):
        if name in TOKEN_COLUMNS:
            continue
        if name == TARGETS or (targets is not None and values.shape in (targets.shape, n_rows)):
            found += [Items(name, shifted, ignore_index) for shifted in ((False, True) if can_shift else (False,))]
        elif values.shape == n_rows:
            found.append(Items(name, False, ignore_index, "rows"))
        elif not is_tokens_column(str(name), tensors) and _may_weight(values, has_labels=targets is not None):
            found.append(Items(name, False, ignore_index, "elements"))
    return found


def _may_weight(values: Tensor, *, has_labels: bool) -> bool:
    """Return whether a column with several numbers per row may say which of them count."""
    if values.is_complex() or values.numel() > _MOST_ELEMENTS:
        return False
    return not has_labels or bool(((values == 0) | (values == 1)).all())


def candidates(batches: Sequence[Batch], ignore_index: int) -> list[Rule]:
    """Return the counts by a single rule that may explain a loss on these batches, likely ones first.

    These are sums of columns, then counts without NaN, and last counts without another value. The labels come after
    other columns: of labels that are measurements, each value explains the weight of the one row that has it.
    """
    sums, without_nan, without = list[Rule](), list[Rule](), list[Rule]()
    every = items_of(batches[0], ignore_index) if batches else []
    for items in sorted(every, key=lambda items: items.column == TARGETS):
        values = values_in(items, batches)
        if items.column != TARGETS and bool((values >= 0).all()):
            sums.append(ColumnSum(items))
        distinct = values[values == values].unique().tolist()
        if bool((values != values).any()):
            without_nan.append(WithoutValue(items, math.nan))
        if len(distinct) <= _MOST_VALUES:
            without += [WithoutValue(items, value) for value in distinct]
    return [*sums, *without_nan, *without]


def values_in(items: Items, batches: Sequence[Batch]) -> Tensor:
    """Return the column's value for each item of some batches."""
    return torch.cat([items.values(batch).cpu().double() for batch in batches])


def columns_by_name(batch: Batch) -> dict[Any, Tensor]:
    """Return the columns of a batch by name. The targets of a pair have the names of `named_targets`."""
    given = batch if isinstance(batch, Mapping) else named_targets(batch[1])
    return {name: value for name, value in given.items() if isinstance(value, Tensor) and value.ndim}


def named_targets(targets: Any) -> dict[Any, Any]:
    """Return the targets of a tuple (inputs, targets) by name: `labels`, or `targets[0]`, … if several."""
    if isinstance(targets, Mapping):
        several = list(targets.items())
    elif isinstance(targets, tuple) or (isinstance(targets, list) and targets and isinstance(targets[0], Tensor)):
        several = list(enumerate(targets))
    else:
        return {TARGETS: targets}
    return {f"targets[{place!r}]": value for place, value in several}


def _unlike_most(values_N: Tensor, weights_N: Tensor) -> list[float]:
    """Return the distinct values whose weights are not the most frequent one; not more than a column may have."""
    unlike = values_N[weights_N != weights_N.mode().values].unique().tolist()
    return unlike[:_MOST_VALUES]


def _of(column: str) -> str:
    return "" if column == TARGETS else f"with {column!r} "
