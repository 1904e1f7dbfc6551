"""What a loss can be a mean over, and how many of it a micro-batch holds.

A head does not say what its mean runs over, so each way to count is a candidate here, and `probing` measures which
one explains the head's loss.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import DataError, SettingsError

IGNORE_INDEX = -100  # the label that PyTorch's cross entropy, and with it all of Transformers, leaves out

OF_USER = "count_items"  # the name of the user's own way to count

# Columns of one number a token, beside labels; other columns may be of a fixed size.
TOKEN_COLUMNS = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "special_tokens_mask"}

Batch = Any  # a mapping of tensors, or a tuple (inputs, targets)
CountItems = Callable[[Batch], Any]


def rows_of(batch: Batch) -> int:
    """Return the rows of a collated batch: the first dimension of its first tensor. A packed row is one row."""
    return next(t.shape[0] for t in tensors_of(batch) if t.ndim)


def tensors_of(batch: Batch) -> list[Tensor]:
    """Every tensor of a batch, in order."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        return [t for value in batch.values() for t in tensors_of(value)]
    if isinstance(batch, list | tuple):
        return [t for value in batch for t in tensors_of(value)]
    return []


def targets_of(batch: Batch) -> Tensor | None:
    """The tensor that the loss compares with: `labels` of a mapping, the second of a tuple, None where absent."""
    found = batch.get("labels") if isinstance(batch, Mapping) else batch[1]
    return found if isinstance(found, Tensor) else None


class ItemCounter:
    """The ways to count a batch's loss items, by name, in the order in which ties are settled."""

    def __init__(self, ignore_index: int = IGNORE_INDEX, class_weights: Tensor | None = None) -> None:
        """Args:
        class_weights: of a loss that says that it weights classes: its mean is over these.
        """
        self.ignore_index = ignore_index
        self._class_weights = None if class_weights is None else class_weights.detach().cpu()
        self.ways: dict[str, CountItems] = {
            "class weights": self._weights,
            "labels": self._labels,
            "labels after the shift": self._shifted_labels,
            "rows": rows_of,
            "elements": self._elements,
            "tokens": _tokens,
        }

    def applicable(self, batch: Batch) -> dict[str, CountItems]:
        """The ways that mean something for this batch."""
        targets = targets_of(batch)
        if targets is None:
            return self.of_inputs(batch)
        integers = not targets.is_floating_point()
        names = [*(["labels"] if integers else []), "rows", "elements"]
        if integers and targets.ndim == 2 and targets.shape[1] > 1:
            names.insert(1, "labels after the shift")
        if integers and self._class_weights is not None:
            names.insert(0, "class weights")
        return {name: self.ways[name] for name in names} | self.of_inputs(batch)

    def of_inputs(self, batch: Batch) -> dict[str, CountItems]:
        """Those of them that ask nothing of the labels, the finest last."""
        has_tokens = isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor)
        return {name: self.ways[name] for name in ("rows", *(("tokens",) if has_tokens else ()))}

    def convention(self, batch: Batch) -> str:
        """For a loss handed over as a sum, of which no mean can be measured: labels where they are integers, else
        elements, as PyTorch's own mean reductions count; rows where there are no targets."""
        targets = targets_of(batch)
        return "rows" if targets is None else "elements" if targets.is_floating_point() else "labels"

    def _weights(self, batch: Batch) -> float:
        targets = _targets(batch)
        assert self._class_weights is not None, "only where `applicable` names it"
        return float(self._class_weights[targets[targets != self.ignore_index].cpu()].sum())

    def _labels(self, batch: Batch) -> int:
        return int((_targets(batch) != self.ignore_index).sum())

    def _shifted_labels(self, batch: Batch) -> int:
        return int((_targets(batch)[:, 1:] != self.ignore_index).sum())

    def _elements(self, batch: Batch) -> int:
        return _targets(batch).numel()


def _tokens(batch: Batch) -> int:
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    # A mask for pairs of tokens does not say how many tokens there are.
    return int(mask.sum()) if isinstance(mask, Tensor) and mask.shape == ids.shape else ids.numel()


def _targets(batch: Batch) -> Tensor:
    targets = targets_of(batch)
    if targets is None:
        raise DataError("Rows without `labels` came among rows with them. Give every row its labels (-100 to ignore).")
    return targets


def counts_from_user(counted: Any, terms: Sequence[str]) -> dict[str, float]:
    """Return what `count_items` gave, by term; a term that it leaves out has no items.

    Raises:
        SettingsError: where it is not a number or a dict of numbers, or counts a term that is not known.
    """
    by_term = dict(counted) if isinstance(counted, Mapping) else dict.fromkeys(terms, counted)
    if unknown := sorted(set(by_term) - set(terms)):
        raise SettingsError(
            [
                f"`count_items` counts {unknown}, but the terms of the loss are {sorted(terms)}. Return a dict with "
                "all of its terms for every batch, and 0 for those without items."
            ]
        )
    return {term: _as_count(by_term.get(term, 0)) for term in terms}


def _as_count(value: Any) -> float:
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < math.inf:
        raise SettingsError(
            [f"`count_items` must give a finite number of 0 or more for a batch, but gave {value!r} instead."]
        )
    return number


def relabelled(batch: Batch, ignore_index: int) -> Batch | None:
    """A copy with other labels, on which ways to count differ widely that agree on the batch as it is.

    In odd rows two labels count, the first of the row and one more: two labels, one of them after the shift. In even
    rows all do that did, and the first. Where that would be two labels in each, odd rows keep the first alone, none
    after the shift. None where the labels cannot be ignored in part.
    """
    targets = targets_of(batch)
    if targets is None or targets.is_floating_point() or targets.ndim != 2 or not isinstance(batch, Mapping):
        return None
    labels_BL = targets.clone()
    are_few = bool(((targets[::2, 1:] != ignore_index).sum(1) <= 1).all())
    for row, labels_L in enumerate(labels_BL):
        counted = (labels_L != ignore_index).nonzero().flatten()
        if len(counted):
            labels_L[0] = labels_L[counted[0]]
            if row % 2:
                labels_L[counted[counted > 0][not are_few :]] = ignore_index
    return {**batch, "labels": labels_BL}
