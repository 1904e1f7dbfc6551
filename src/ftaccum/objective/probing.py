"""Which items a head's mean runs over, measured.

A mean over items of any kind obeys  mean(A ∪ B) = (n_A · mean(A) + n_B · mean(B)) / (n_A + n_B)  for the right way
to count n and, in general, for no other. So the loss of a few rows together is compared with their losses apart
under every way to count.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .counting import Batch, Counting, relabelled

# Relative difference up to which the joint loss counts as explained. Heads compute parts of a float64 model's loss in
# float32; in half precision the rounding of each loss is as large as 2**-8.
_TOLERANCE, _HALF_TOLERANCE = 1e-5, 2e-2
# Ways that agree on the rows give the same weights to the last bits.
_TIE = 1e-12

Losses = Callable[[Batch], Mapping[str, float]]
Differences = dict[str, dict[str, float]]  # term → way to count → relative difference


@dataclass(frozen=True)
class Probe:
    """What was measured.

    Attributes:
        ways: by term, the name of the way to count that explains the joint loss best.
        differences: by term, the relative difference that this way leaves.
        padding_sensitive: whether rows must be padded to one width for the loss to be explained.
        tolerance: the difference up to which a term counts as explained.
    """

    ways: dict[str, str]
    differences: dict[str, float]
    padding_sensitive: bool
    tolerance: float

    @property
    def unexplained(self) -> list[str]:
        """A clause for each term that is not one mean over countable items."""
        return [
            f"{term!r} of rows apart, weighted by {self.ways[term]}, is {difference:.2%} off that of them together"
            for term, difference in self.differences.items()
            if difference > self.tolerance
        ]


def probe(
    losses: Losses,
    together: Batch,
    cut: Callable[[Batch], Sequence[Batch]] | None,
    padded_apart: Sequence[Batch],
    *,
    counting: Counting,
    half_precision: bool = False,
) -> Probe:
    """Finds the way to count that explains the loss of `together` from the losses of its parts.

    Args:
        losses: the means of a batch by term.
        together: a few labelled rows of different lengths, collated as one batch.
        cut: cuts such a batch into unequal groups of rows; None where that cannot be done.
        padded_apart: the same groups collated by themselves; empty where that would give other rows, because the
            collator draws at random.
        counting: the ways to count.
        half_precision: whether the model computes in 16 bits, and rounds accordingly.
    """
    assert cut or padded_apart, "rows are apart in one way at least"
    tolerance = _HALF_TOLERANCE if half_precision else _TOLERANCE
    joint = losses(together)
    alike = _compare(losses, joint, cut(together), counting) if cut else None
    apart = _compare(losses, joint, padded_apart, counting) if padded_apart else None
    # Groups that explain the joint loss only where they are padded alike: a softmax over padding.
    sensitive = alike is not None and apart is not None and _explains(alike, tolerance) > _explains(apart, tolerance)
    found = alike if apart is None or sensitive else apart
    assert found is not None
    ways = {term: _tied(by_way) for term, by_way in found.items()}
    if cut and any(len(tied) > 1 for tied in ways.values()):
        ways = _untied(ways, losses, together, cut, counting, tolerance)
    first = {term: tied[0] for term, tied in ways.items()}
    left = {term: found[term][way] for term, way in first.items()}
    return Probe(first, left, sensitive, tolerance)


def _compare(losses: Losses, joint: Mapping[str, float], parts: Sequence[Batch], counting: Counting) -> Differences:
    """For each term and way to count: |Σ n·mean / Σ n - joint mean| / |joint mean| over the parts."""
    means = [losses(part) for part in parts]
    found: Differences = {term: {} for term in joint}
    for way, count in counting.applicable(parts[0]).items():
        counts = [count(part) for part in parts]
        for term, whole in joint.items():
            weighted = sum(n * mean[term] for n, mean in zip(counts, means, strict=True) if n)
            difference = abs(weighted / sum(counts) - whole) / abs(whole) if sum(counts) and whole else math.inf
            found[term][way] = difference if math.isfinite(difference) else math.inf
    return found


def _explains(differences: Differences, tolerance: float) -> bool:
    return all(min(by_way.values()) <= tolerance for by_way in differences.values())


def _tied(by_way: Mapping[str, float]) -> list[str]:
    best = min(by_way.values())
    return [way for way, difference in by_way.items() if difference <= best + _TIE]


def _untied(
    ways: dict[str, list[str]],
    losses: Losses,
    together: Batch,
    cut: Callable[[Batch], Sequence[Batch]],
    counting: Counting,
    tolerance: float,
) -> dict[str, list[str]]:
    """Asks again with other labels. Where a head does not leave the ignored ones out, its ties stay."""
    asking = relabelled(together, counting.ignore_index)
    if asking is None:
        return ways
    differences = _compare(losses, losses(asking), cut(asking), counting)
    asked = {term: {way: differences[term][way] for way in tied} for term, tied in ways.items()}
    return {term: _tied(by_way) if min(by_way.values()) <= tolerance else ways[term] for term, by_way in asked.items()}
