"""Measure which items a head's mean runs over.

A mean over items of any kind obeys  mean(A ∪ B) = (n_A · mean(A) + n_B · mean(B)) / (n_A + n_B)  for the right way
to count n and, in general, for no other. So this module compares the loss of a few rows in one batch with their losses
in separate batches, weighted by every way to count.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from .item_counts import Batch, CountItems, relabelled, tensors_of

# The largest relative difference at which a way to count still explains a loss. It is the same for float32 and float64,
# because heads compute parts of a float64 model's loss in float32. The second is for models measured in 16 bits, which
# happens only if memory does not allow float32.
EXPLAINED, EXPLAINED_IN_HALF = 1e-5, 2e-2
# Two ways to count whose differences are this close fit equally well.
_TIE = 1e-9

Losses = Callable[[Batch], Mapping[str, float]]
Ways = Mapping[str, Mapping[str, CountItems]]  # term → name of the way → count
Cut = Callable[[Batch], Sequence[Batch]]


@dataclass(frozen=True)
class Explanation:
    """The differences that the chosen ways to count leave between the loss of one batch and that of separate ones.

    Attributes:
        differences: for each term, the relative difference between the loss of one batch and the weighted losses of
            separate batches.
        padding: the same difference for batches that are padded to their own width, if the loss is explained only when
            all are padded to one width; else 0.
        adds_up: whether the unweighted losses of separate batches add up to that of one batch: a sum, not a mean.
    """

    differences: dict[str, float]
    padding: float
    adds_up: bool

    @property
    def padding_sensitive(self) -> bool:
        return self.padding > 0

    def with_differences(self, differences: Mapping[str, float]) -> "Explanation":
        """Return a copy with these differences where they are larger."""
        larger = {term: max(found, differences.get(term, 0.0)) for term, found in self.differences.items()}
        return replace(self, differences=larger)

    def worst(self, other: "Explanation") -> "Explanation":
        """Return the larger differences of two measurements. Padding matters if it did in either of them."""
        differences = {term: max(found, other.differences[term]) for term, found in self.differences.items()}
        return Explanation(differences, max(self.padding, other.padding), self.adds_up and other.adds_up)

    def with_exact(self, terms: Sequence[str]) -> "Explanation":
        """Return a copy with a difference of 0 for terms that were not measured."""
        return replace(self, differences={**self.differences, **dict.fromkeys(terms, 0.0)})


def cache_losses(losses: Losses, known: Sequence[tuple[Batch, Mapping[str, float]]] = ()) -> Losses:
    """Return a function that remembers the losses of each batch. It is valid as long as the weights stay the same.

    Args:
        known: batches whose losses are known already.
    """
    found = {_key(batch): losses_of_batch for batch, losses_of_batch in known}

    def answered(batch: Batch) -> Mapping[str, float]:
        key = _key(batch)
        if key not in found:
            found[key] = losses(batch)
        return found[key]

    return answered


def _key(batch: Batch) -> tuple[Any, ...]:
    return tuple((t.shape, t.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()) for t in tensors_of(batch))


def choose(losses: Losses, together: Batch, parts: Cut, ways: Ways, ignore_index: int) -> dict[str, str]:
    """Return, for each term, the way to count that best explains the loss of `together` from the losses of its parts.

    If several ways fit equally well, compare them again with other labels. If they still do, take the first.

    Args:
        losses: maps a batch to its means by term.
        together: a batch of a few labelled rows of different lengths.
        parts: splits such a batch into groups of rows of unequal size.
        ways: the ways to count each term.
        ignore_index: the label that the loss is known to ignore.
    """
    tied = _closest(losses, together, parts, ways)
    asking = relabelled(together, ignore_index)
    if asking is not None and any(len(names) > 1 for names in tied.values()):
        asked = {term: {way: ways[term][way] for way in names} for term, names in tied.items()}
        with suppress(IndexError):  # the user's loss may not accept the label that others ignore
            tied = _closest(losses, asking, parts, asked)
    return {term: names[0] for term, names in tied.items()}


def _closest(losses: Losses, together: Batch, parts: Cut, ways: Ways) -> dict[str, list[str]]:
    joint, separate = losses(together), parts(together)
    means = [losses(part) for part in separate]
    tied = {}
    for term, by_way in ways.items():
        found = {way: difference(joint, means, separate, term, count) for way, count in by_way.items()}
        tied[term] = [way for way, off in found.items() if off <= min(found.values()) + _TIE]
    return tied


def explain(
    losses: Losses,
    together: Batch,
    cut: Cut | None,
    padded: Sequence[Batch],
    chosen: Mapping[str, CountItems],
    tolerance: float = EXPLAINED,
) -> Explanation:
    """Measure how well the chosen ways to count explain the loss, and whether padding matters to it.

    Args:
        losses: maps a batch to its means by term.
        together: a batch of a few rows.
        cut: splits `together` into groups of rows of unequal size; None if that is impossible.
        padded: the same groups, each padded to its own width; empty if there are none.
        chosen: the way to count each term.
        tolerance: the largest difference that counts as rounding.
    """
    joint = losses(together)
    groups = [group for group in (cut(together) if cut else [], padded) if group]
    assert groups, "`cut` or `padded` is given"
    found, adds_up = [], False
    for separate in reversed(groups):
        means = [losses(part) for part in separate]
        found.append({term: difference(joint, means, separate, term, count) for term, count in chosen.items()})
        sums = {term: sum(mean[term] for mean in means) for term in joint}
        adds_up = adds_up or all(relative(sums[term], joint[term]) <= tolerance for term in joint)
        if max(found[0].values(), default=0.0) <= tolerance:  # one width adds nothing to this
            break
    own_width, equal_width = found[0], found[-1]
    # Terms that are explained only if all groups have the same width: a softmax over padding, for example.
    sensitive = [own_width[term] for term in chosen if equal_width[term] <= tolerance < own_width[term]]
    return Explanation(equal_width if sensitive else own_width, max(sensitive, default=0.0), adds_up)


def difference(
    joint: Mapping[str, float],
    means: Sequence[Mapping[str, float]],
    parts: Sequence[Batch],
    term: str,
    count: CountItems,
) -> float:
    """Return |Σ n·mean / Σ n - joint mean| / |joint mean| over the parts; infinite if they have no items."""
    counts = [count(part) for part in parts]
    weighted = sum(n * mean[term] for n, mean in zip(counts, means, strict=True) if n)
    return relative(weighted / sum(counts), joint[term]) if sum(counts) else math.inf


def relative(found: float, wanted: float) -> float:
    """Return |found - wanted| / |wanted|, or |found| if `wanted` is 0; infinite instead of NaN."""
    off = abs(found - wanted) / abs(wanted) if wanted else abs(found)
    return off if math.isfinite(off) else math.inf
