"""Which items a head's mean runs over, measured.

A mean over items of any kind obeys  mean(A ∪ B) = (n_A · mean(A) + n_B · mean(B)) / (n_A + n_B)  for the right way
to count n and, in general, for no other. So the loss of a few rows together is compared with their losses apart
under every way to count.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from .item_counts import Batch, CountItems, relabelled, tensors_of

# Relative difference up to which a way to count explains a loss. Heads compute parts of a float64 model's loss in
# float32, so the two are taken alike. 16 bits are tried only where memory does not allow more.
EXPLAINED, EXPLAINED_IN_HALF = 1e-5, 2e-2
# Ways that count in the same proportions differ by this much at most.
_TIE = 1e-9

Losses = Callable[[Batch], Mapping[str, float]]
Ways = Mapping[str, Mapping[str, CountItems]]  # term → name of the way → count
Cut = Callable[[Batch], Sequence[Batch]]


@dataclass(frozen=True)
class Explanation:
    """How well the chosen ways to count explain the losses.

    Attributes:
        differences: by term, the relative difference between the loss of rows together and that of rows apart.
        padding: the same for rows that are padded to their own width, where padding is all that makes a difference:
            rows must be padded to one width then for the loss to be explained. 0 where it makes none.
        adds_up: whether the losses of the parts, unweighted, add up to the joint one: a sum, not a mean.
    """

    differences: dict[str, float]
    padding: float
    adds_up: bool

    @property
    def padding_sensitive(self) -> bool:
        return self.padding > 0

    def with_differences(self, differences: Mapping[str, float]) -> "Explanation":
        """Return the same, with these differences where they are larger."""
        larger = {term: max(found, differences.get(term, 0.0)) for term, found in self.differences.items()}
        return replace(self, differences=larger)

    def worst(self, other: "Explanation") -> "Explanation":
        """The larger differences of two measurements; padding matters where it did in either."""
        differences = {term: max(found, other.differences[term]) for term, found in self.differences.items()}
        return Explanation(differences, max(self.padding, other.padding), self.adds_up and other.adds_up)

    def with_exact(self, terms: Sequence[str]) -> "Explanation":
        """Return the same with terms that nothing was measured of."""
        return replace(self, differences={**self.differences, **dict.fromkeys(terms, 0.0)})


def cache_losses(losses: Losses) -> Losses:
    """The same, a batch met again answered from memory: for as long as the weights stay."""
    known: dict[Any, Mapping[str, float]] = {}

    def answered(batch: Batch) -> Mapping[str, float]:
        key = tuple((t.shape, t.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()) for t in tensors_of(batch))
        if key not in known:
            known[key] = losses(batch)
        return known[key]

    return answered


def choose(losses: Losses, together: Batch, parts: Cut, ways: Ways, ignore_index: int) -> dict[str, str]:
    """For each term, the way to count that explains the loss of `together` best from the losses of its parts.

    Ways that agree on the rows as they are get asked again with other labels; of those that agree even then, the first
    is taken.

    Args:
        losses: the means of a batch by term.
        together: a few labelled rows of different lengths.
        parts: such a batch in unequal groups of rows.
    """
    tied = _closest(losses, together, parts, ways)
    asking = relabelled(together, ignore_index)
    if asking is not None and any(len(names) > 1 for names in tied.values()):
        asked = {term: {way: ways[term][way] for way in names} for term, names in tied.items()}
        with suppress(IndexError):  # a loss of the user's own may not take the label that others leave out
            tied = _closest(losses, asking, parts, asked)
    return {term: names[0] for term, names in tied.items()}


def _closest(losses: Losses, together: Batch, parts: Cut, ways: Ways) -> dict[str, list[str]]:
    joint, apart = losses(together), parts(together)
    means = [losses(part) for part in apart]
    tied = {}
    for term, by_way in ways.items():
        found = {way: difference(joint, means, apart, term, count) for way, count in by_way.items()}
        tied[term] = [way for way, off in found.items() if off <= min(found.values()) + _TIE]
    return tied


def explain(
    losses: Losses,
    together: Batch,
    cut: Cut | None,
    padded_apart: Sequence[Batch],
    chosen: Mapping[str, CountItems],
    tolerance: float = EXPLAINED,
) -> Explanation:
    """Measures how well the chosen ways to count explain the loss, and whether padding matters to it.

    Args:
        cut: `together` in unequal groups of rows; None where that cannot be done.
        padded_apart: the same groups collated by themselves; empty where that would give other rows, because the
            collator draws at random.
        chosen: the way to count, by term.
    """
    joint = losses(together)
    groups = [group for group in (cut(together) if cut else [], padded_apart) if group]
    assert groups, "rows are apart in one way at least"
    found, adds_up = [], False
    for apart in groups:
        means = [losses(part) for part in apart]
        found.append({term: difference(joint, means, apart, term, count) for term, count in chosen.items()})
        sums = {term: sum(mean[term] for mean in means) for term in joint}
        adds_up = adds_up or all(relative(sums[term], joint[term]) <= tolerance for term in joint)
    alike, apart_ = found[0], found[-1]
    # Terms that are explained only where all groups are padded alike: a softmax over padding.
    sensitive = [apart_[term] for term in chosen if alike[term] <= tolerance < apart_[term]]
    return Explanation(alike if sensitive else apart_, max(sensitive, default=0.0), adds_up)


def difference(
    joint: Mapping[str, float],
    means: Sequence[Mapping[str, float]],
    parts: Sequence[Batch],
    term: str,
    count: CountItems,
) -> float:
    """|Σ n·mean / Σ n - joint mean| / |joint mean| over the parts."""
    counts = [count(part) for part in parts]
    weighted = sum(n * mean[term] for n, mean in zip(counts, means, strict=True) if n)
    return relative(weighted / sum(counts), joint[term]) if sum(counts) else math.inf


def relative(found: float, wanted: float) -> float:
    """|found - wanted| / |wanted|; infinite where that is no number."""
    off = abs(found - wanted) / abs(wanted) if wanted else abs(found)
    return off if math.isfinite(off) else math.inf
