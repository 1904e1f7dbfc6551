"""Sentences of film reviews, MIT (package vaderSentiment, from C.J. Hutto and E. Gilbert, "VADER", ICWSM 2014)."""

import random

from .files import CACHE, extract, unpacked, write_csv

MOVIES_TRAIN, MOVIES_VAL = CACHE / "movie_reviews_train.csv", CACHE / "movie_reviews_val.csv"
PATHS = (MOVIES_TRAIN, MOVIES_VAL)

_PACKAGE, _ARCHIVE, _FILE = "vaderSentiment==3.3.2", "hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt"
_HELD_OUT = 2000
_CLEAR = 0.5  # sentences with scores closer to 0 count as neither good nor bad


def prepare() -> None:
    """Prepare sentences of film reviews whose mean human score is at least 0.5 (label 1) or at most -0.5 (label 0)."""
    with unpacked(_PACKAGE, megabytes=2, from_source=True) as folder:
        extract(next(folder.rglob(_ARCHIVE)), folder)
        text = next(folder.rglob(_FILE)).read_text("utf-8", "replace")
    scored = [line.split("\t", 2)[1:] for line in text.splitlines() if line.count("\t") >= 2]
    rows = [(words.strip(), int(float(score) > 0)) for score, words in scored if abs(float(score)) >= _CLEAR]
    random.Random(0).shuffle(rows)
    for path, part in ((MOVIES_VAL, rows[:_HELD_OUT]), (MOVIES_TRAIN, rows[_HELD_OUT:])):
        write_csv(path, ("text", "label"), part)
