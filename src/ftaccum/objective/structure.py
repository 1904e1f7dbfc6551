"""The structure of a loss, as a few passes show it: its terms, when they are missing, and changes of the batch."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import DataError, SettingsError
from .batch_changes import WatchedBatch
from .item_counts import Batch, CountItems
from .objective import refuse_mean_over_nothing
from .probe import Losses
from .sample import Sample

ROWS = "the first rows"


def terms_of(found: Mapping[str, float], together: Batch, count_items: CountItems | None) -> tuple[str, ...]:
    """Return every term that the loss has, or that `count_items` counts.

    Args:
        found: the terms that the loss has in eval mode or in train mode, with their values.
        together: a few rows.

    Raises:
        SettingsError: if `count_items` leaves out a term of the loss.
    """
    counted = None if count_items is None else count_items(together)
    if not isinstance(counted, Mapping):
        return tuple(found)
    if any(loss and math.isfinite(loss) and term not in counted for term, loss in found.items()):
        raise SettingsError(
            [
                f"`count_items` must count every term of the loss, {sorted(found)}, but counts {sorted(counted)} "
                "instead. Return a dict with a number for every term, or one number for all of them."
            ]
        )
    return tuple(dict.fromkeys((*found, *counted)))


def without_items(counts: Mapping[str, CountItems], batch: Batch) -> list[str]:
    """Return the terms of which a batch has no items."""
    return [term for term, count in counts.items() if not count(batch)]


@dataclass
class ObservedPasses:
    """A record of forward passes on a few rows, besides their losses.

    Attributes:
        absent: for each pass whose loss lacked terms, those terms and its batch.
        changes: for each pass that changed its batch, the batch as it was before and the one that was watched.
        shown: the terms that were not 0 in at least one pass.
    """

    absent: list[tuple[list[str], Batch]] = field(default_factory=list)
    changes: list[tuple[Batch, WatchedBatch]] = field(default_factory=list)
    shown: set[str] = field(default_factory=set)

    def add(self, batch: Batch, watched: WatchedBatch, found: Mapping[str, Tensor], terms: Sequence[str]) -> None:
        """Record one forward pass."""
        if absent := [term for term in terms if term not in found]:
            self.absent.append((absent, batch))
        if watched.changed():
            self.changes.append((batch, watched))
        self.shown |= {term for term, mean in found.items() if mean.item()}

    def absent_is_zero(self, counts: Mapping[str, CountItems], unexplained: Collection[str]) -> list[str]:
        """Return the terms that the loss leaves out for batches that have items of them, and that count as 0 there.

        Args:
            counts: how to count each term that has items.
            unexplained: the terms whose loss this count does not explain.

        Raises:
            SettingsError: if the count does not explain such a term, or the term was 0 in all passes.
        """
        absent = {term for terms, batch in self.absent for term in terms if term in counts and counts[term](batch)}
        unknown = next((term for term in sorted(absent) if term in unexplained or term not in self.shown), None)
        if unknown is not None:
            raise SettingsError(
                [
                    f"The loss has the term {unknown!r} for some rows and not for others, and the check before "
                    "training could not find out which items it is a mean over. Give `count_items`: a function that "
                    f"returns a dict with the number of items of every term, {[*counts]}, and 0 for a term without "
                    "items."
                ]
            )
        return sorted(absent)

    def counts_before_changes(self, counts: Mapping[str, CountItems], unexplained: Collection[str]) -> bool:
        """Return whether forward passes change the number of items, although the count before them is right.

        Raises:
            DataError: if passes change the targets, and the count before them does not explain the loss.
        """
        for batch, watched in self.changes if unexplained else []:
            if targets := watched.changed_targets(batch):
                raise DataError(
                    f"The forward pass changes {targets} of a batch in place, so the items that the loss is a mean "
                    "over cannot be counted before the pass. Make the change in the data or in `data_collator` "
                    "instead, or give a `count_items` that counts only the items that are left after it."
                )
        return any(_counted(counts, batch) != _counted(counts, watched.as_seen()) for batch, watched in self.changes)


def check_means(losses: Losses, sample: Sample, counts: Mapping[str, CountItems]) -> None:
    """Raise DataError if a term with items is not finite, or a term without items is not 0. Name the rows."""

    def is_faulty(batch: Batch, term: str) -> bool:
        return not math.isfinite(losses(batch)[term]) and bool(counts[term](batch))

    for term, loss in losses(sample.together).items():
        if not counts[term](sample.together):
            refuse_mean_over_nothing(term, loss, ROWS)
        if not is_faulty(sample.together, term):
            continue
        singly = sample.separate(sample.together, [[n] for n in range(len(sample.names))])
        named = zip(sample.names, singly, strict=True)
        # The sample may contain a row more than once.
        faulty = list(dict.fromkeys(name for name, row in named if is_faulty(row, term)))
        are_some = 0 < len(faulty) < len(set(sample.names))
        looked_at = "in these rows" if are_some else "in the model's weights and in the rows"
        of_others = (
            " If the term should not count for these rows, give a `count_items` that returns 0 for it."
            if len(counts) > 1
            else ""
        )
        raise DataError(
            f"The {term} of {', '.join(faulty) if are_some else ROWS} of `train_data` is {loss} before any update. "
            f"Look for infinite or NaN values {looked_at}.{of_others}"
        )


def _counted(counts: Mapping[str, CountItems], batch: Batch) -> dict[str, float]:
    return {term: count(batch) for term, count in counts.items()}
