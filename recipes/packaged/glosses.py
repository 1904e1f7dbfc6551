"""A dictionary as plain text. See `wordnet` for its source and license."""

import random
from collections.abc import Mapping, Sequence

from . import wordnet
from .files import CACHE, prepare_missing, write_lines

GLOSSES_TRAIN, GLOSSES_VAL = CACHE / "glosses_train.txt", CACHE / "glosses_val.txt"
PATHS = (GLOSSES_TRAIN, GLOSSES_VAL)

_HELD_OUT = 2000


def prepare() -> None:
    """Prepare text files with an entry in each line. The same 2,000 entries are always held out."""
    prepare_missing(wordnet)
    lines = as_entries(wordnet.read_definitions())
    random.Random(0).shuffle(lines)
    write_lines(GLOSSES_VAL, lines[:_HELD_OUT])
    write_lines(GLOSSES_TRAIN, lines[_HELD_OUT:])


def as_entries(definitions: Mapping[str, Sequence[str]]) -> list[str]:
    """Return entries such as "auto, car: a motor vehicle with four wheels". No definition is in two entries."""
    words_of: dict[str, set[str]] = {}
    for word, texts in definitions.items():
        for text in filter(None, map(str.strip, texts)):
            words_of.setdefault(text, set()).add(word)
    return [f"{', '.join(sorted(of_text))}: {text}" for text, of_text in words_of.items()]
