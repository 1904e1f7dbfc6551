"""Definitions of English words, each with the word. See `wordnet` for their source and license."""

import random
from collections.abc import Mapping, Sequence

from . import wordnet
from .files import CACHE, prepare_missing, write_csv

WORDS_TRAIN, WORDS_VAL = CACHE / "definitions_train.csv", CACHE / "definitions_val.csv"
PATHS = (WORDS_TRAIN, WORDS_VAL)

_HELD_OUT = 2000
_FEWEST_WORDS = 4  # shorter definitions are mostly synonyms
_STEM = 4  # letters


def prepare() -> None:
    """Prepare pairs of a definition and its word. No word and no definition is in two rows.

    The same 2,000 pairs are always held out.
    """
    prepare_missing(wordnet)
    train, held_out = split_pairs(wordnet.read_definitions(), wordnet.read_frequencies())
    for path, part in ((WORDS_VAL, held_out), (WORDS_TRAIN, train)):
        write_csv(path, ("definition", "word"), part)


def split_pairs(
    definitions: Mapping[str, Sequence[str]], frequencies: Mapping[str, int]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the pairs of a definition and its word to train on, and those that are held out."""
    rows = as_pairs(definitions, frequencies)
    random.Random(0).shuffle(rows)
    return rows[_HELD_OUT:], rows[:_HELD_OUT]


def as_pairs(definitions: Mapping[str, Sequence[str]], frequencies: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pair definitions with words, each at most once.

    A definition belongs to the most frequent of its words. A word gets the first of its definitions that has at least
    four words and does not give it away by its first four letters. Words without a frequency are left out.
    """
    words: dict[str, str] = {}
    for word, texts in definitions.items():
        for text in map(str.strip, texts):
            if frequencies.get(word, 0) > frequencies.get(words.get(text, ""), 0):
                words[text] = word
    pairs: dict[str, str] = {}
    for text, word in words.items():
        if len(text.split()) >= _FEWEST_WORDS and word[:_STEM] not in text.lower():
            pairs.setdefault(word, text)
    return [(text, word) for word, text in pairs.items()]
