"""The answers to questions, in the forms that data have them in, and where they stand in their contexts."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from ..errors import DataError
from .columns import naming
from .row_warnings import warn_of_rows

_FORMS = (
    "a text, with its first character in a column `answer_start`, or {'text': [...], 'answer_start': [...]}, or none "
    "for a question that the context does not answer"
)
_FIX = "Fix or drop the row."


@dataclass(frozen=True)
class Answers:
    """The right answers to a question; none if its context does not answer it.

    Attributes:
        texts: the answers.
        start, end: the first character of the first answer in its context, and the one after its last; both -1 if there
            is no answer.
        is_moved: whether the first answer stands elsewhere than the data say.
    """

    texts: tuple[str, ...] = ()
    start: int = -1
    end: int = -1
    is_moved: bool = False


def read_answers(rows: Dataset, argument: str) -> list[Answers]:
    """Return the answers of each row, found in its context.

    An answer is searched for if the data give no position, or if it is not at that position. Its context must contain
    it exactly once.

    Args:
        argument: the argument that names the rows, for messages.

    Raises:
        DataError: naming the first row whose question, context or answers are something else, or counting the rows
            whose answer cannot be found.

    Warns:
        TextWarning: if answers stand elsewhere than the data say.
    """
    check_texts(rows, argument)
    found, lost = [], []
    for n, (context, texts, starts) in enumerate(_given(rows, argument)):
        answers = _located(context, texts, starts)
        found.append(answers or Answers(tuple(texts)))
        if answers is None:
            lost.append((n, texts[0], context.count(texts[0])))
    if lost:
        n, text, times = lost[0]
        where = "does not contain" if not times else f"contains {times} times"
        raise DataError(
            f"{len(lost)} of the {len(found)} rows of `{argument}` have an answer that cannot be found. The first is "
            f"row {n}: its context {where} {text!r:.60}, and `answer_start` does not say where. Fix or drop these rows."
        )
    moved = [answers.is_moved for answers in found]
    warn_of_rows(argument, moved, "have an answer that does not stand at `answer_start`; it is taken where it does.")
    return found


def check_texts(rows: Dataset, argument: str) -> None:
    """Raise DataError for the first row whose question or context is no text."""
    for role in ("question", "context"):
        for n, text in enumerate(rows[role]):
            if not isinstance(text, str):
                raise DataError(
                    f"In `{argument}`, row {n} has {text!r:.60} instead of a text as its {role}. Name the column "
                    f"with {naming(role)}, or fix or drop the row."
                )


def _given(rows: Dataset, argument: str) -> Iterator[tuple[str, list[str], list[int | None]]]:
    """Yield the context of each row, its answers, and the first character of each if the data say it."""
    starts = rows["answer_start"] if "answer_start" in rows.column_names else [None] * len(rows)
    for n, (context, answers, start) in enumerate(zip(rows["context"], rows["answers"], starts, strict=True)):
        try:
            texts, places = _parts(answers, start)
        except (TypeError, KeyError, AttributeError, ValueError):
            raise DataError(
                f"In `{argument}`, row {n} has {answers!r:.80} as its answers, but answers are {_FORMS}. {_FIX}"
            ) from None
        yield context, texts, places


def _parts(answers: Any, start: Any) -> tuple[list[str], list[int | None]]:
    """Return the texts of answers that are not empty, and their places.

    Raises:
        TypeError, KeyError, AttributeError, ValueError: if answers have another form.
    """
    if isinstance(answers, Mapping):
        answers, start = answers["text"], answers.get("answer_start")
    elif isinstance(answers, list) and answers and isinstance(answers[0], Mapping):
        start = [each.get("answer_start") for each in answers]
        answers = [each["text"] for each in answers]
    texts = _listed(answers)
    if all(text in (None, "") for text in texts):
        return [], []
    places = [None] * len(texts) if start is None else _listed(start)
    parts = [(text, _place(place)) for text, place in zip(texts, places, strict=True) if text not in (None, "")]
    if not all(isinstance(text, str) for text, _ in parts):
        raise TypeError
    return [text for text, _ in parts], [place for _, place in parts]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _place(value: Any) -> int | None:
    """Return the first character of an answer. A column of a CSV file that lacks some numbers has decimal ones."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or int(value) != value:
        raise TypeError
    return int(value)


def _located(context: str, texts: Sequence[str], starts: Sequence[int | None]) -> Answers | None:
    """Return answers with the place of the first one; None if it cannot be found."""
    if not texts:
        return Answers()
    text, start = texts[0], starts[0]
    is_there = start is not None and start >= 0 and context.startswith(text, start)
    place = start if is_there and start is not None else context.find(text)
    if place < 0 or (not is_there and context.find(text, place + 1) >= 0):
        return None
    # Spaces around an answer may have no tokens, so that no window would contain it.
    begin, end = place + len(text) - len(text.lstrip()), place + len(text.rstrip())
    return Answers(tuple(texts), begin, max(begin, end), is_moved=start is not None and not is_there)
