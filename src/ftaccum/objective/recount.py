"""Check the chosen count on rare rows, and replace it where it does not explain their loss.

Four rows rarely have all labels. A loss that leaves one out, or weights it, looks like a plain mean on them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .item_counts import OF_USER, Batch, CountItems
from .own_rules import ValueWeights, candidates, items_of
from .probe import Losses, Ways, difference
from .row_weights import Weights, weigh_rows, weigh_values
from .sample import RowGroup, Sample

_NAMED = 3  # rows in a sentence
_UNCERTAIN = 1e-2  # the error, relative, of a weight that is not known well enough to be used
_DIGITS = 3  # of a round weight, at most
_UNLIKE = 1e-3  # relative: rows whose items weigh differently from the others'


@dataclass(frozen=True)
class Observed:
    """The loss of rows together, and of parts of them."""

    joint: Mapping[str, float]
    means: Sequence[Mapping[str, float]]
    parts: Sequence[Batch]

    @classmethod
    def of(cls, losses: Losses, joint: Batch, parts: Sequence[Batch]) -> "Observed":
        """Measure rows together and apart."""
        return cls(losses(joint), [losses(part) for part in parts], parts)

    def difference(self, term: str, count: CountItems) -> float:
        """Return how far a count is from explaining a term; 0 where the term is not finite, or not there."""
        if not math.isfinite(self.joint.get(term, math.nan)):
            return 0.0
        means = [{term: mean.get(term, math.nan)} for mean in self.means]
        return difference(self.joint, means, self.parts, term, count)


@dataclass(frozen=True)
class Recount:
    """What all rows say of one term.

    Attributes:
        name: of the count that explains it best.
        count: that count.
        difference: how far it is from explaining the loss.
        at_fault: the rows that it does not explain although it explains the first four, in words.
    """

    name: str
    count: CountItems
    difference: float
    at_fault: str = ""


class RareCheck:
    """Counts a loss again on rare rows.

    Args:
        first: what was observed on the first four rows.
        ignore_index: the label that the loss is known to leave out.
    """

    def __init__(self, losses: Losses, first: Observed, sample: Sample, ignore_index: int) -> None:
        self._losses, self._groups, self._ignore_index = losses, sample.rare, ignore_index
        self._has_all_labels = not sample.not_looked_at
        rare = [Observed.of(losses, g.together, [g.take([n]) for n in range(len(g.names))]) for g in sample.rare]
        self._observed = [first, *rare]

    def recounts(self, names: Mapping[str, str], ways: Ways, tolerance: float) -> dict[str, Recount]:
        """Count each term again that one of these ways was chosen for."""
        return {term: self.recount(term, name, ways[term], tolerance) for term, name in names.items()}

    def recount(self, term: str, name: str, ways: Mapping[str, CountItems], tolerance: float) -> Recount:
        """Return the count that explains a term on all rows: the one it has, else another of the ways, else one by a
        rule of the loss's own, else the weights of its labels.

        Args:
            name: of the way that the first four rows were explained by.
            ways: to count the term; the user's is the only one.
        """
        kept = Recount(name, ways[name], self.difference(term, ways[name]))
        if kept.difference <= tolerance:
            return kept
        weights = [self._weights(group, term) for group in self._groups]
        others = [*self._candidates(), *self._weighted(weights)] if name != OF_USER else []
        for other, count in [*ways.items(), *((str(count), count) for count in others)]:
            if (found := self.difference(term, count)) <= tolerance:
                return Recount(other, count, found)
        if self._observed[0].difference(term, kept.count) > tolerance:
            return kept
        return replace(kept, at_fault=self._at_fault(weights, kept.count))

    def difference(self, term: str, count: CountItems) -> float:
        """Return how far a count is from explaining a term on any of the rows."""
        return max(observed.difference(term, count) for observed in self._observed)

    def _candidates(self) -> list[CountItems]:
        return candidates([group.together for group in self._groups], self._ignore_index)

    def _weights(self, group: RowGroup, term: str) -> Weights:
        return weigh_rows(lambda rows: self._losses(group.take(rows)).get(term, math.nan), group)

    def _weighted(self, weights: Sequence[Weights]) -> Iterator[CountItems]:
        """Yield the weights of the values of each column that would make the rows weigh as they do, round ones first
        where these are within the error of measurement."""
        rows = [(g, n) for g in self._groups for n in range(len(g.names))] if self._has_all_labels else []
        for items in items_of(self._groups[0].together, self._ignore_index) if rows else ():
            of_rows = [items.values(group.take([n])).cpu().double().numpy() for group, n in rows]
            values = np.unique(np.concatenate(of_rows))
            counts_NV = np.array([[np.sum(row == value) for value in values] for row in of_rows], dtype=float)
            solved = weigh_values(weights, counts_NV)
            if solved is None or (solved.errors > _UNCERTAIN * np.maximum(solved.values, 1.0)).any():
                continue
            for each_V in (_round(solved), solved.values):
                yield ValueWeights(items, values.tolist(), each_V.tolist())

    def _at_fault(self, weights: Sequence[Weights], count: CountItems) -> str:
        """Return the rows whose items weigh otherwise than those of the first, in words."""
        named = []
        for group, of_group in zip(self._groups, weights, strict=True):
            counts = np.array([count(group.take([n])) for n in range(len(group.names))])
            with np.errstate(divide="ignore", invalid="ignore"):
                each = of_group.values / counts * counts[0]
            named += [
                f"{name} {each[n]:.3g} times" for n, name in enumerate(group.names) if not abs(each[n] - 1) <= _UNLIKE
            ]
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        return ", ".join(named[:_NAMED]) + more


def _round(weights: Weights) -> np.ndarray:
    """Return for each weight the roundest number within its error, else itself."""
    found = weights.values
    for digits in range(_DIGITS, 0, -1):
        rounded = np.array([float(f"{weight:.{digits}g}") for weight in weights.values])
        found = np.where(np.abs(rounded - weights.values) <= weights.errors, rounded, found)
    return found
