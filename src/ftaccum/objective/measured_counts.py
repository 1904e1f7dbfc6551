"""The counts that a measurement chose for the terms of a loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .item_counts import CountItems, counts_from_user
from .probe import Ways
from .recount import Recount


@dataclass(frozen=True)
class MeasuredCounts:
    """How each term is counted.

    Attributes:
        names: the names of the counts.
        by_term: the counts themselves.
        empty: the terms without items in the first rows.
        recounts: the counts of all terms after the check on rare rows, if there was one.
        own_rules: the counts that are none of the named ways, because the loss has a rule of its own.
        shifts: whether logits predict the next label.
    """

    names: dict[str, str]
    by_term: dict[str, CountItems]
    empty: Sequence[str]
    recounts: Mapping[str, Recount]
    own_rules: Mapping[str, CountItems]
    shifts: bool

    @property
    def with_items(self) -> dict[str, CountItems]:
        """The counts of the terms with items in the first rows."""
        return {term: count for term, count in self.by_term.items() if term not in self.empty}


def chosen_counts(
    ways: Ways, names: Mapping[str, str], own_rules: Mapping[str, CountItems] | None = None
) -> dict[str, CountItems]:
    """Return the count of each term by the name of its way, or by a rule of the loss's own."""
    own_rules = own_rules or {}
    return {term: own_rules[term] if term in own_rules else ways[term][name] for term, name in names.items()}


def count_of_term(count_items: CountItems, term: str, terms: Sequence[str]) -> CountItems:
    """Return the user's count of one term."""
    return lambda batch: counts_from_user(count_items(batch), terms)[term]
