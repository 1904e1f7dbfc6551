"""Check the chosen count on rare rows, and replace it if it does not explain their loss.

Four rows rarely have all label values. On rows without a certain value, a loss that ignores or weights that value looks
like a plain mean.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .item_counts import OF_USER, Batch, CountItems
from .own_rules import Items, Rule, ValueWeights, candidates, items_of, values_in
from .probe import Losses, Ways, difference
from .row_weights import Weights, weigh_rows, weigh_values
from .sample import Evidence, RowGroup, Sample

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

    @classmethod
    def of_group(cls, losses: Losses, group: RowGroup) -> "Observed":
        """Measure a group of rows, and each row in a batch of its own."""
        return cls.of(losses, group.together, [group.take([n]) for n in range(len(group.names))])

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
        self._has_all_labels, self._further_rows = not sample.not_looked_at, sample.further
        self._observed = [first, *(Observed.of_group(losses, group) for group in sample.rare)]
        self._further: list[tuple[RowGroup, Observed]] = []
        self._searched: list[Evidence] = []

    def recounts(self, names: Mapping[str, str], ways: Ways, tolerance: float) -> dict[str, Recount]:
        """Check the way that was chosen for each term, and return the count to use instead."""
        return {term: self.recount(term, name, ways[term], tolerance) for term, name in names.items()}

    def recount(self, term: str, name: str, ways: Mapping[str, CountItems], tolerance: float) -> Recount:
        """Return the count that explains a term on all rows.

        Try the current way first, then the others, then rules that the loss may have, and last measured weights. If a
        rule explains the loss, try it on further rows as well. If none does, return the current way.

        Args:
            name: the name of the way that was chosen on the first four rows.
            ways: the ways to count the term. The user's own is the only one.
        """
        kept = Recount(name, ways[name], self.difference(term, ways[name]))
        if kept.difference <= tolerance:
            return kept
        for other, count in ways.items():
            if (off := self.difference(term, count)) <= tolerance:
                return Recount(other, count, off)
        may_follow_rule = name != OF_USER
        if may_follow_rule and (found := self._rule(term, self._candidates(), tolerance)) is not None:
            return found
        weights = [self._weights(group, term) for group in self._groups]
        if may_follow_rule and (found := self._rule(term, list(self._weighted(weights)), tolerance)) is not None:
            return found
        if self._observed[0].difference(term, kept.count) > tolerance:
            return kept
        return replace(kept, at_fault=self._at_fault(weights, kept.count))

    def difference(self, term: str, count: CountItems) -> float:
        """Return how far a count is from explaining a term on any of the rows."""
        try:
            return max(observed.difference(term, count) for observed in self._observed)
        except DataError:  # a value whose weight was not measured
            return math.inf

    def _rule(self, term: str, rules: Sequence[Rule], tolerance: float) -> Recount | None:
        """Return the first rule that explains a term, also on further rows that have a value it counts differently.

        Prefer rules that rest on several rows. One that rests on a single row may explain its weight by chance.
        """
        fitting = [rule for rule in rules if self.difference(term, rule) <= tolerance]
        self._look_further([self._evidence(rule) for rule in fitting])
        fitting = [rule for rule in fitting if self._holds_further(term, rule, tolerance)]
        shown = (rule for rule in fitting if self._n_rows_with(rule.items, self._evidence(rule)[1]) > 1)
        single = (rule for rule in fitting if rule.may_rest_on_one_row(self._values(rule.items)))
        rule = next(chain(shown, single), None)
        return None if rule is None else Recount(str(rule), rule, self.difference(term, rule))

    def _look_further(self, evidence: Sequence[Evidence]) -> None:
        """Measure other rows that have the values that rules count differently."""
        new = [each for each in evidence if each not in self._searched]
        self._searched += new
        groups = self._further_rows(new) if new else ()
        self._further += [(group, Observed.of_group(self._losses, group)) for group in groups]

    def _holds_further(self, term: str, rule: Rule, tolerance: float) -> bool:
        """Return whether a rule explains the further rows; weights that were measured do so up to their errors."""
        most = max(tolerance, _UNLIKE) if isinstance(rule, ValueWeights) else tolerance
        try:
            return all(observed.difference(term, rule) <= most for _, observed in self._further)
        except DataError:  # a value whose weight was not measured
            return False

    def _evidence(self, rule: Rule) -> Evidence:
        return rule.items.column, rule.evidence(self._values(rule.items))

    def _values(self, items: Items) -> Tensor:
        return values_in(items, [group.together for group in self._groups])

    def _n_rows_with(self, items: Items, values: Sequence[float]) -> int:
        """Return how many of the measured rows have one of these values."""
        rows = {
            position: group.take([n])
            for group in (*self._groups, *(group for group, _ in self._further))
            for n, position in enumerate(group.positions)
        }
        wanted = torch.tensor(values, dtype=torch.float64)
        found = (values_in(items, [row]) for row in rows.values())
        return sum(bool(_are_equal(each[:, None], wanted).any()) for each in found)

    def _candidates(self) -> Sequence[Rule]:
        return candidates([group.together for group in self._groups], self._ignore_index)

    def _weights(self, group: RowGroup, term: str) -> Weights:
        return weigh_rows(lambda rows: self._losses(group.take(rows)).get(term, math.nan), group)

    def _weighted(self, weights: Sequence[Weights]) -> Iterator[Rule]:
        """Yield counts that weight the values of one column such that the rows weigh as measured."""
        rows = [(g, n) for g in self._groups for n in range(len(g.names))] if self._has_all_labels else []
        for items in items_of(self._groups[0].together, self._ignore_index) if rows else ():
            of_rows = [items.values(group.take([n])).cpu().double().numpy() for group, n in rows]
            values = np.unique(np.concatenate(of_rows))
            if np.any(values[np.isfinite(values)] % 1) and 2 * len(values) > sum(map(len, of_rows)):
                continue  # measurements, each with a value of its own
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


def _are_equal(one: Tensor, other: Tensor) -> Tensor:
    """Return where numbers are equal; NaN equals NaN. `torch.isclose` of torch 2.9 does not broadcast NaN."""
    return (one == other) | (one.isnan() & other.isnan())
