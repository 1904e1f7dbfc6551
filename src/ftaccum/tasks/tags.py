"""The words and tags of rows, in the forms that data have them in, and the names of the tags."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, LargeList, List, Value

from ..errors import DataError, listed
from ..objective.item_counts import IGNORE_INDEX
from ..runtime.log import logger
from .columns import naming
from .entities import order_of_tag

_NAMED = 12  # tags to name in a message
_FIX = "Fix or drop the row."
_KINDS = {
    "tokens": "lists of words, or texts of words separated by spaces",
    "tags": "lists of names or whole numbers from 0 on, or texts of names separated by spaces: one tag for each word",
}


@dataclass(frozen=True)
class Tags:
    """The names of tags, in the order of their numbers."""

    names: tuple[str, ...]

    @classmethod
    def read(cls, rows: Dataset, argument: str) -> "Tags":
        """Find the tags of rows, and log them with their numbers of words.

        Args:
            argument: the argument that names the rows, for messages.

        Raises:
            DataError: if the columns hold something else, or a row has not as many tags as words.
        """
        counts = Counter(tag for _, tags in words_and_tags(rows, argument) for tag in tags)
        counts.pop(str(IGNORE_INDEX), None)
        if not counts:
            raise DataError(f"The rows of `{argument}` have no tags at all. Check the column: {naming('tags')}.")
        given = class_names(rows)
        if given is None and all(name.isdecimal() for name in counts):
            tags = cls(tuple(map(str, range(max(map(int, counts)) + 1))))
        else:
            tags = cls(given or tuple(sorted(counts, key=order_of_tag)))
        counted = [f"{name} ({counts[name]:,})" for name in tags.names]
        logger.info(f"Tags: {listed(counted, _NAMED)}")
        return tags

    @property
    def numbers(self) -> dict[str, int]:
        """The number of each tag by its name. A tag of -100 is not scored."""
        return {str(IGNORE_INDEX): IGNORE_INDEX, **{name: n for n, name in enumerate(self.names)}}

    def check(self, rows: Dataset, argument: str) -> None:
        """Raise DataError for the first row that does not fit, or whose tags are others than these."""
        known = self.numbers
        for n, (_, tags) in enumerate(words_and_tags(rows, argument)):
            if unknown := [tag for tag in tags if tag not in known]:
                raise DataError(
                    f"In `{argument}`, row {n} has the tag {unknown[0]!r}, which is none of those that the model is "
                    f"trained on: {listed([*map(repr, self.names)], _NAMED)}. Fix the tag, or train on such rows."
                )


def class_names(rows: Dataset) -> tuple[str, ...] | None:
    """Return the names that the data give to the numbers of their tags; None if they give none."""
    inner = _inner(rows.features["tags"])
    return tuple(inner.names) if isinstance(inner, ClassLabel) else None


def words_of(value: str | Sequence[str]) -> list[str]:
    """Return the words of a list, or of a text of words separated by spaces."""
    return value.split() if isinstance(value, str) else list(value)


def tags_of(value: Any, given: Sequence[str] | None) -> list[str]:
    """Return the names of tags.

    Args:
        given: the `class_names` of the data.
    """
    tags: Sequence[Any] = value.split() if isinstance(value, str) else value
    return [given[tag] if given is not None and tag != IGNORE_INDEX else str(tag) for tag in tags]


def check_words(rows: Dataset, argument: str) -> None:
    """Raise DataError if the column of words holds something else."""
    _check_column(rows, argument, "tokens")
    for n, words in enumerate(rows["tokens"]):
        if words is None or (not isinstance(words, str) and None in words):
            raise DataError(f"In `{argument}`, row {n} has {_shown(words)} instead of its words. {_FIX}")


def words_and_tags(rows: Dataset, argument: str) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the words of each row, and the names of their tags.

    Raises:
        DataError: if a column holds something else, or a row has not as many tags as words. It names the first row.
    """
    check_words(rows, argument)
    _check_column(rows, argument, "tags")
    given = class_names(rows)
    n_known = None if given is None else len(given)
    for n, (words, tags) in enumerate(zip(rows["tokens"], rows["tags"], strict=True)):
        name = f"In `{argument}`, row {n}"
        if tags is None or not all(_is_tag(tag, n_known) for tag in tags):
            raise DataError(f"{name} has {_shown(tags)} instead of a tag for each word. {_FIX}")
        words, tags = words_of(words), tags_of(tags, given)
        if len(words) != len(tags):
            raise DataError(f"{name} has {len(words)} words, but {len(tags)} tags. {_FIX}")
        yield words, tags


def _is_tag(tag: Any, n_known: int | None) -> bool:
    """Return whether a tag, or a letter of a text of tags, is valid."""
    if isinstance(tag, str):
        return bool(tag)
    return tag is not None and (tag == IGNORE_INDEX or (tag >= 0 and (n_known is None or tag < n_known)))


def _check_column(rows: Dataset, argument: str, role: str) -> None:
    """Raise DataError if a column holds something else than words, or tags."""
    feature = rows.features[role]
    dtype = getattr(_inner(feature), "dtype", "")
    is_list = isinstance(feature, List | LargeList)
    allowed = (
        ("string", "large_string") if role == "tokens" or not is_list else ("string", "large_string", "int", "uint")
    )
    fits = (is_list or isinstance(feature, Value)) and dtype.rstrip("0123456789") in allowed
    remedy = f"Name the column: {naming(role)}."
    if not fits:
        raise DataError(f"The column of {role} in `{argument}` holds {feature}, but must hold {_KINDS[role]}. {remedy}")
    first = next(iter(rows.select_columns([role])[:1][role]), None)
    if isinstance(first, str) and first.startswith("[") and first.endswith("]"):
        raise DataError(
            f"The column of {role} in `{argument}` holds lists that were written as text, such as {first!r:.60}. Save "
            f"the rows as JSON lines or Parquet, or write {_KINDS[role].split(', or ')[1]}."
        )


def _inner(feature: Any) -> Any:
    return feature.feature if isinstance(feature, List | LargeList) else feature


def _shown(value: Any) -> str:
    return f"{value!r:.60}"
