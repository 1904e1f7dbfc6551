"""Sentences of film reviews, four at a time: one praises the film, and three criticize it.

See `movies` for their source and license. People scored each sentence; the choice between four is constructed.
"""

import csv
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import movies
from .files import CACHE, prepare_missing, write_jsonl
from .movies import MOVIES_TRAIN, MOVIES_VAL

CHOICES_TRAIN, CHOICES_VAL = CACHE / "choices_train.jsonl", CACHE / "choices_val.jsonl"
PATHS = (CHOICES_TRAIN, CHOICES_VAL)

_QUESTION = "Which sentence praises the film?"
_WRONG = 3  # sentences in a row that criticize the film


def prepare() -> None:
    """Prepare rows {"context": question, "choices": [four sentences], "label": number of the right one}.

    No sentence comes twice. The held-out rows have the held-out sentences of `movies`.
    """
    prepare_missing(movies)
    for path, source in ((CHOICES_TRAIN, MOVIES_TRAIN), (CHOICES_VAL, MOVIES_VAL)):
        write_jsonl(path, as_choices(read(source)))


def read(file: Path) -> list[tuple[str, int]]:
    """Return the sentences of a file with their labels, 1 for praise."""
    with file.open(encoding="utf-8", newline="") as rows:
        return [(row["text"], int(row["label"])) for row in csv.DictReader(rows)]


def as_choices(sentences: Sequence[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """Put each sentence of praise among three others, in random order, as long as there are three others."""
    draw = random.Random(0)
    praise = [text for text, label in sentences if label == 1]
    others = iter([text for text, label in sentences if label == 0])
    for right, *wrong in zip(praise, *[others] * _WRONG, strict=False):
        choices = [right, *wrong]
        draw.shuffle(choices)
        yield {"context": _QUESTION, "choices": choices, "label": choices.index(right)}
