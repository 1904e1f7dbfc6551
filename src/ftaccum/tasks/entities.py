"""Entities in sequences of tags, and their precision, recall and F1.

The rules are those of the shared task CoNLL-2000 (E. Tjong Kim Sang and S. Buchholz, "Introduction to the CoNLL-2000
Shared Task: Chunking"), extended to tags for the end (E, L) and for single words (S, U). They accept IOB1, IOB2, IOE,
BIOES and BILOU alike.
"""

import re
from collections.abc import Iterable, Sequence

OUTSIDE = "O"
_TAG = re.compile(r"([BIESLU])(?:-(.+))?")
_OPEN, _CONTINUING = "BI", "IEL"  # tags that another may follow in their entity, and those that may follow one

Entity = tuple[str, int, int]  # type, first word, last word


def mark_entities(names: Iterable[str]) -> bool:
    """Return whether tags mark entities, as O, B-PER and I-PER do. Other tags are plain classes."""
    inside = set(names) - {OUTSIDE}
    return bool(inside) and all(_TAG.fullmatch(name) for name in inside)


def order_of_tag(name: str) -> tuple[bool, str, str]:
    """Return the key that sorts tags: O first, then by type, so that B-PER is next to I-PER."""
    found = _TAG.fullmatch(name)
    return (name != OUTSIDE, found[2] or "", found[1]) if found else (name != OUTSIDE, name, "")


def entities(tags: Sequence[str]) -> set[Entity]:
    """Return the entities of a row of tags."""
    found, start = set(), 0
    for n, tag in enumerate(tags):
        prefix, kind = _parts(tag)
        if not prefix:
            continue
        if not (n and _continues(_parts(tags[n - 1]), (prefix, kind))):
            start = n
        if n + 1 == len(tags) or not _continues((prefix, kind), _parts(tags[n + 1])):
            found.add((kind, start, n))
    return found


def entity_scores(wanted: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]) -> dict[str, float]:
    """Return precision, recall and F1 over all entities. A predicted entity is right if its type and both ends are.

    Args:
        wanted, predicted: the tags of each row.
    """
    n_wanted = n_predicted = n_right = 0
    for row, predicted_row in zip(wanted, predicted, strict=True):
        these, others = entities(row), entities(predicted_row)
        n_wanted, n_predicted, n_right = n_wanted + len(these), n_predicted + len(others), n_right + len(these & others)
    return {
        "precision": n_right / n_predicted if n_predicted else 0.0,
        "recall": n_right / n_wanted if n_wanted else 0.0,
        "f1": 2 * n_right / (n_wanted + n_predicted) if n_wanted + n_predicted else 0.0,
    }


def _parts(tag: str) -> tuple[str, str]:
    """Return the prefix and the type of a tag; empty strings for O."""
    found = _TAG.fullmatch(tag)
    return (found[1], found[2] or "") if found else ("", "")


def _continues(before: tuple[str, str], after: tuple[str, str]) -> bool:
    """Return whether two tags that follow each other belong to one entity."""
    (prefix, kind), (next_prefix, next_kind) = before, after
    return kind == next_kind and prefix in tuple(_OPEN) and next_prefix in tuple(_CONTINUING)
