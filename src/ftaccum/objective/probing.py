"""Which items a head's mean runs over, measured.

A mean over items of any kind obeys  mean(A ∪ B) = (n_A · mean(A) + n_B · mean(B)) / (n_A + n_B)  for the right way
to count n and, in general, for no other. So the loss of a few rows together is compared with their losses apart
under every way to count.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .counting import Batch, CountItems, relabelled


@dataclass(frozen=True)
class Precision:
    """How closely losses can be compared: `explained` is the relative difference up to which a way to count explains
    the joint loss, `tie` the one that rounding alone may make between two ways."""

    explained: float
    tie: float


# Heads compute parts of a float64 model's loss in float32, so the two are taken alike.
FULL, HALF = Precision(1e-5, 1e-6), Precision(2e-2, 5e-3)

Losses = Callable[[Batch], Mapping[str, float]]
Ways = Mapping[str, Mapping[str, CountItems]]  # term → name of the way → count
Differences = dict[str, dict[str, float]]  # term → name of the way → relative difference


@dataclass(frozen=True)
class Probe:
    """What was measured.

    Attributes:
        ways: by term, the name of the way to count that explains the joint loss best.
        differences: by term, the relative difference that this way leaves.
        padding_sensitive: whether rows must be padded to one width for the loss to be explained.
        adds_up: whether the losses of the parts, unweighted, add up to the joint one: a sum, not a mean.
        tolerance: the difference up to which a term counts as explained.
    """

    ways: dict[str, str]
    differences: dict[str, float]
    padding_sensitive: bool
    adds_up: bool
    tolerance: float

    @property
    def unexplained(self) -> list[str]:
        """A clause for each term that is not one mean over countable items."""
        return [
            f"{term!r} of rows apart, weighted by {self.ways[term]}, is {difference:.2%} off that of them together"
            for term, difference in self.differences.items()
            if difference > self.tolerance
        ]


@contextmanager
def shaken(model: nn.Module) -> Iterator[None]:
    """Gives the model's last weights noise, and takes it away again.

    Which items a mean runs over does not depend on the weights; but rows must differ in loss for it to show, and
    under a new head they hardly do, or, rounded to 16 bits, not at all.
    """
    weight = _last_weight(model)
    if weight is None:
        yield
        return
    before = weight.detach().clone()
    # Logits of a few units: the inputs of a last layer are about 1 each, or normalised to it.
    scale = 3 / math.sqrt(weight.numel() / weight.shape[0])
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * scale
    try:
        with torch.no_grad():
            weight.add_(noise.to(weight.device, weight.dtype))
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


def probe(
    losses: Losses,
    together: Batch,
    cut: Callable[[Batch], Sequence[Batch]] | None,
    padded_apart: Sequence[Batch],
    *,
    ways: Ways,
    ignore_index: int,
    precision: Precision = FULL,
) -> Probe:
    """Finds the way to count that explains the loss of `together` from the losses of its parts.

    Args:
        losses: the means of a batch by term.
        together: a few labelled rows of different lengths, collated as one batch.
        cut: cuts such a batch into unequal groups of rows; None where that cannot be done.
        padded_apart: the same groups collated by themselves; empty where that would give other rows, because the
            collator draws at random.
        ways: the ways to count, by term; of those that no difference tells apart, the first.
        ignore_index: the label that heads leave out.
        precision: of the losses.
    """
    assert cut or padded_apart, "rows are apart in one way at least"
    joint = losses(together)
    alike = _compare(losses, joint, cut(together), ways) if cut else None
    apart = _compare(losses, joint, padded_apart, ways) if padded_apart else None
    # Groups that explain the joint loss only where they are padded alike: a softmax over padding.
    sensitive = alike is not None and apart is not None and _explains(alike, precision) > _explains(apart, precision)
    found = alike if apart is None or sensitive else apart
    assert found is not None
    tied = {term: _closest(by_way, precision.tie) for term, by_way in found.items()}
    if cut and any(len(names) > 1 for names in tied.values()):
        tied = _untied(tied, losses, together, cut, ways, ignore_index, precision)
    first = {term: names[0] for term, names in tied.items()}
    left = {term: found[term][way] for term, way in first.items()}
    parts = [losses(part) for part in (cut(together) if cut else padded_apart)]
    adds_up = all(_relative(sum(part[term] for part in parts), joint[term]) <= precision.explained for term in joint)
    return Probe(first, left, sensitive, adds_up and len(parts) > 1, precision.explained)


def _compare(losses: Losses, joint: Mapping[str, float], parts: Sequence[Batch], ways: Ways) -> Differences:
    """For each term and way to count: |Σ n·mean / Σ n - joint mean| / |joint mean| over the parts."""
    means = [losses(part) for part in parts]
    found: Differences = {term: {} for term in joint}
    for term, whole in joint.items():
        for way, count in ways[term].items():
            counts = [count(part) for part in parts]
            weighted = sum(n * mean[term] for n, mean in zip(counts, means, strict=True) if n)
            found[term][way] = _relative(weighted / sum(counts), whole) if sum(counts) else math.inf
    return found


def _relative(found: float, wanted: float) -> float:
    difference = abs(found - wanted) / abs(wanted) if wanted else abs(found)
    return difference if math.isfinite(difference) else math.inf


def _explains(differences: Differences, precision: Precision) -> bool:
    return all(min(by_way.values()) <= precision.explained for by_way in differences.values())


def _closest(by_way: Mapping[str, float], tie: float) -> list[str]:
    best = min(by_way.values())
    return [way for way, difference in by_way.items() if difference <= best + tie]


def _untied(
    tied: dict[str, list[str]],
    losses: Losses,
    together: Batch,
    cut: Callable[[Batch], Sequence[Batch]],
    ways: Ways,
    ignore_index: int,
    precision: Precision,
) -> dict[str, list[str]]:
    """Asks again with other labels. Where a head does not leave the ignored ones out, its ties stay."""
    asking = relabelled(together, ignore_index)
    if asking is None:
        return tied
    asked = {term: {way: ways[term][way] for way in names} for term, names in tied.items()}
    differences = _compare(losses, losses(asking), cut(asking), asked)
    return {
        term: _closest(by_way, _EQUAL) if min(by_way.values()) <= precision.explained else tied[term]
        for term, by_way in differences.items()
    }


_EQUAL = 1e-12  # ways that count in the same proportions differ by this much at most, in any precision


def _last_weight(model: Any) -> Tensor | None:
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    weight = getattr(head, "weight", None)
    candidates = [p for p in model.parameters() if p.ndim >= 2 and p.is_floating_point() and p.numel()]
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight
    return candidates[-1] if candidates else None
