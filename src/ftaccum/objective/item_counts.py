"""Ways to count the loss items of a micro-batch.

A model's head does not declare what its mean runs over, so each way to count is a candidate here. `probe` measures
which one explains the head's loss.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..errors import DataError, SettingsError

IGNORE_INDEX = -100  # the label that PyTorch's cross entropy ignores, and with it all of Transformers

# Names of ways to count: the user's, and that of models that predict the next token.
OF_USER, AFTER_SHIFT = "count_items", "labels after the next-token shift"

# Columns with one number per token, besides labels. Other columns may have a fixed size.
TOKEN_COLUMNS = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "special_tokens_mask"}

Batch = Any  # a mapping of tensors, or a tuple (inputs, targets)
CountItems = Callable[[Batch], Any]
Declared = tuple[int, Tensor | None]  # the ignored label, and class weights of shape (classes,)


def rows_of(batch: Batch) -> int:
    """Return the number of rows of a collated batch: the first dimension of its first tensor. A packed row is one."""
    return next(t.shape[0] for t in tensors_of(batch) if t.ndim)


def tensors_of(batch: Batch) -> list[Tensor]:
    """Return all tensors of a batch, in order."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        return [t for value in batch.values() for t in tensors_of(value)]
    if isinstance(batch, list | tuple):
        return [t for value in batch for t in tensors_of(value)]
    return []


def targets_of(batch: Batch) -> Tensor | None:
    """Return the targets: `labels` of a mapping, or the second element of a tuple; None if there are none."""
    found = batch.get("labels") if isinstance(batch, Mapping) else batch[1]
    return found if isinstance(found, Tensor) else None


def are_per_token(targets: Any) -> TypeGuard[Tensor]:
    """Return whether targets are integers, one for each token, of shape (rows, length)."""
    return isinstance(targets, Tensor) and targets.ndim == 2 and not targets.is_floating_point()


class ItemCounter:
    """The ways to count a batch's loss items, by name. If several explain a loss equally well, the first is used."""

    def __init__(self, ignore_index: int = IGNORE_INDEX, declared: Callable[[], Declared] | None = None) -> None:
        """Args:
        declared: returns the ignored label and the class weights that the loss declares at present; None for a loss
            without class weights. The mean of a loss with class weights is over the weights of the labels.
        """
        self.ignore_index = ignore_index
        self._declared = declared or (lambda: (ignore_index, None))
        self._had_weights = self._declared()[1] is not None
        self._on_host = _OnHost()

    @property
    def ways(self) -> dict[str, CountItems]:
        """The ways to count by name."""
        return {
            "class weights": self._weights,
            "labels": self._labels,
            AFTER_SHIFT: self._shifted_labels,
            "rows": rows_of,
            "elements": self._elements,
            "tokens": _tokens,
        }

    def applicable(self, batch: Batch) -> dict[str, CountItems]:
        """Return the ways that apply to this batch."""
        targets = targets_of(batch)
        if targets is None:
            return self.of_inputs(batch)
        integers = not targets.is_floating_point()
        names = [*(["labels"] if integers else []), "rows", "elements"]
        if are_per_token(targets) and targets.shape[1] > 1:
            names.insert(1, AFTER_SHIFT)
        if integers and self._declared()[1] is not None:
            names.insert(0, "class weights")
        return {name: self.ways[name] for name in names} | self.of_inputs(batch)

    def of_inputs(self, batch: Batch) -> dict[str, CountItems]:
        """Return the ways that do not use labels, the finest last."""
        has_tokens = isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor)
        return {name: self.ways[name] for name in ("rows", *(("tokens",) if has_tokens else ()))}

    def convention(self, batch: Batch) -> str:
        """Return how to count the items of a loss that is given as a sum, for which nothing can be measured.

        As PyTorch's own mean reductions do, count labels if they are integers, else elements. Without targets, count
        rows.
        """
        targets = targets_of(batch)
        return "rows" if targets is None else "elements" if targets.is_floating_point() else "labels"

    def _weights(self, batch: Batch) -> float:
        ignored, weights = self._declared()
        targets = _targets(batch)
        counted = targets[targets != ignored]
        return len(counted) if weights is None else float(self._on_host(weights)[counted.cpu()].sum())

    def _labels(self, batch: Batch) -> float:
        ignored, weights = self._declared()
        if weights is not None and not self._had_weights:
            return self._weights(batch)
        return int((_targets(batch) != ignored).sum())

    def _shifted_labels(self, batch: Batch) -> int:
        return int((_targets(batch)[:, 1:] != self._declared()[0]).sum())

    def _elements(self, batch: Batch) -> int:
        return _targets(batch).numel()

    def has_items(self, batch: Batch) -> bool:
        """Return whether a batch has a label that counts, or no integer labels."""
        count = self.applicable(batch).get("labels")
        return count is None or bool(count(batch))


class _OnHost:
    """The class weights in the host's memory, copied only if they have changed: to copy them waits for the device."""

    def __init__(self) -> None:
        self._weights: Tensor | None = None
        self._version, self._copy = 0, torch.empty(0)

    def __call__(self, weights: Tensor) -> Tensor:
        version = 0 if weights.is_inference() else weights._version
        if weights.device.type == "cpu":
            return weights.detach()
        if weights is not self._weights or version != self._version:
            self._weights, self._version, self._copy = weights, version, weights.detach().cpu()
        return self._copy


def _tokens(batch: Batch) -> int:
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    # A mask over pairs of tokens does not show how many tokens there are.
    return int(mask.sum()) if isinstance(mask, Tensor) and mask.shape == ids.shape else ids.numel()


def _targets(batch: Batch) -> Tensor:
    targets = targets_of(batch)
    if targets is None:
        raise DataError("Rows without `labels` came with rows that have them. Give every row labels (-100 to ignore).")
    return targets


def counts_from_user(counted: Any, terms: Sequence[str]) -> dict[str, float]:
    """Return the result of `count_items` by term; a term that it leaves out has no items.

    Raises:
        SettingsError: if the result is not a number or a dict of numbers, or counts an unknown term.
    """
    by_term = dict(counted) if isinstance(counted, Mapping) else dict.fromkeys(terms, counted)
    if unknown := sorted(set(by_term) - set(terms)):
        raise SettingsError(
            [
                f"`count_items` counts {unknown}, but the terms of the loss are {sorted(terms)}. Return a dict with "
                "every term of the loss for every batch, and 0 for a term without items."
            ]
        )
    return {term: _as_count(by_term.get(term, 0)) for term in terms}


def _as_count(value: Any) -> float:
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < math.inf:
        raise SettingsError(
            [f"`count_items` must return a finite number of 0 or more for a batch, but returned {value!r} instead."]
        )
    return number


def relabelled(batch: Batch, ignore_index: int) -> Batch | None:
    """Return a copy with other labels, on which ways to count disagree even if they agree on the batch itself.

    In every row, the first position gets a label that counts. Even rows keep all their other labels. Odd rows keep
    only one of them, so that they have two labels, and one after the shift. If even rows have at most one other label
    as well, odd rows keep none. Return None if single labels of a row cannot be ignored.
    """
    targets = targets_of(batch)
    if not are_per_token(targets) or not isinstance(batch, Mapping):
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
