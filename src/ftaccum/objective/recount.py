"""Check the chosen count on rare rows, and replace it if it does not explain their loss.

Four rows rarely have all label values. On rows without a certain value, a loss that ignores or weights that value looks
like a plain mean.
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

_NAMED = 3  # rows to name in a message
_UNLIKE = 1e-3  # relative; messages name rows whose items weigh more or less than others by more than this


@dataclass(frozen=True)
class Observed:
    """The loss of a batch, and of its parts."""

    joint: Mapping[str, float]
    means: Sequence[Mapping[str, float]]
    parts: Sequence[Batch]

    @classmethod
    def of(cls, losses: Losses, joint: Batch, parts: Sequence[Batch]) -> "Observed":
        """Measure a batch and its parts."""
        return cls(losses(joint), [losses(part) for part in parts], parts)

    def difference(self, term: str, count: CountItems) -> float:
        """Return how far a count is from explaining a term; 0 if the term is not finite or is missing."""
        if not math.isfinite(self.joint.get(term, math.nan)):
            return 0.0
        means = [{term: mean.get(term, math.nan)} for mean in self.means]
        if any(_is_loss(mean[term]) and not count(part) for mean, part in zip(means, self.parts, strict=True)):
            return math.inf  # a mean over nothing would be 0 or not finite
        return difference(self.joint, means, self.parts, term, count)


@dataclass(frozen=True)
class Recount:
    """The count of one term after a check on all rows.

    Attributes:
        name: the name of the count that explains the term best.
        count: that count.
        difference: how far it is from explaining the loss.
        at_fault: the rows that it does not explain, for a message, if it explains the first four.
    """

    name: str
    count: CountItems
    difference: float
    at_fault: str = ""


class RareCheck:
    """A check of counts on rare rows.

    Args:
        losses: maps a batch to its losses by term.
        first: the losses of the first four rows.
        sample: the rows, with the rare ones.
        ignore_index: the label that the loss is known to ignore.
    """

    def __init__(self, losses: Losses, first: Observed, sample: Sample, ignore_index: int) -> None:
        self._losses, self._groups, self._ignore_index = losses, sample.rare, ignore_index
        self._has_all_labels = not sample.not_looked_at
        rare = [Observed.of(losses, g.together, [g.take([n]) for n in range(len(g.names))]) for g in sample.rare]
        self._observed = [first, *rare]

    def recounts(self, names: Mapping[str, str], ways: Ways, tolerance: float) -> dict[str, Recount]:
        """Check the way that was chosen for each term, and return the count to use instead."""
        return {term: self.recount(term, name, ways[term], tolerance) for term, name in names.items()}

    def recount(self, term: str, name: str, ways: Mapping[str, CountItems], tolerance: float) -> Recount:
        """Return the count that explains a term on all rows.

        Try the current way first, then the others, then rules that the loss may have, and last measured weights. If
        none explains the loss, return the current way.

        Args:
            name: the name of the way that was chosen on the first four rows.
            ways: the ways to count the term. The user's own is the only one.
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
        """Yield counts that weight the values of one column such that the rows weigh as measured."""
        rows = [(g, n) for g in self._groups for n in range(len(g.names))] if self._has_all_labels else []
        for items in items_of(self._groups[0].together, self._ignore_index) if rows else ():
            of_rows = [items.values(group.take([n])).cpu().double().numpy() for group, n in rows]
            values = np.unique(np.concatenate(of_rows))
            counts_NV = np.array([[np.sum(row == value) for value in values] for row in of_rows], dtype=float)
            found = weigh_values(weights, counts_NV)
            if found is not None and (found := found.rounded()).are_certain:
                yield ValueWeights(items, values.tolist(), found.values.tolist())

    def _at_fault(self, weights: Sequence[Weights], count: CountItems) -> str:
        """Return, for a message, the rows whose items weigh more or less than those of the first row."""
        named = []
        for group, of_group in zip(self._groups, weights, strict=True):
            counts = np.array([count(group.take([n])) for n in range(len(group.names))])
            with np.errstate(divide="ignore", invalid="ignore"):
                each = np.round(of_group.values / counts * counts[0], 9)
            named += [
                f"{name}: {each[n]:.3g} times" for n, name in enumerate(group.names) if not abs(each[n] - 1) <= _UNLIKE
            ]
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        return ", ".join(named[:_NAMED]) + more


def _is_loss(mean: float) -> bool:
    return math.isfinite(mean) and mean != 0
