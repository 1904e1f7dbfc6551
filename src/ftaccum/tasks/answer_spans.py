"""The best answer in the windows of a context, from the model's scores of starts and ends."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from .context_windows import BEGINS, ENDS, FIRST, FOR_METRICS, NOWHERE, ROW

LONGEST = 30  # tokens of an answer


@dataclass(frozen=True)
class Span:
    """An answer: a part of a context, from one character to the one before another. An empty one is no answer.

    Attributes:
        log_score: the logarithm of its probability, which is that of its start times that of its end.
    """

    log_score: float
    start: int = 0
    end: int = 0

    def text(self, context: str) -> str:
        return context[self.start : self.end].strip()


def best_answers(logits: tuple[Any, Any], windows: Dataset) -> dict[int, Span]:
    """Return the best answer to each row.

    This is the most probable part of the context, of at most 30 tokens, in all windows of the row. It is no answer if
    that is more probable in each of the windows.

    Args:
        logits: of starts and of ends, each (windows, tokens). Further tokens than a window has do not count.
        windows: windows with the columns `FOR_METRICS`.
    """
    best: dict[int, Span] = {}
    nothing: dict[int, float] = {}
    starts, ends = logits
    for n, window in enumerate(windows.select_columns(list(FOR_METRICS))):
        row = window[ROW]
        span, no_answer = _best_of(starts[n], ends[n], window)
        nothing[row] = min(no_answer, nothing.get(row, np.inf))
        if span is not None and (row not in best or span.log_score > best[row].log_score):
            best[row] = span
    return {
        row: best[row] if row in best and best[row].log_score >= score else Span(score)
        for row, score in nothing.items()
    }


def _best_of(starts: np.ndarray, ends: np.ndarray, window: Mapping[str, Any]) -> tuple[Span | None, float]:
    """Return the best answer of a window, if it has context, and the logarithm of the probability of no answer."""
    begins, first = window[BEGINS], window[FIRST]
    places = [window[NOWHERE], *range(first, first + len(begins))]
    start, end = _log_shares(starts[places]), _log_shares(ends[places])
    no_answer, start, end = float(start[0] + end[0]), start[1:], end[1:]
    if not len(start):
        return None, no_answer
    # For each length, the best answer of that many tokens and its first token.
    sums = [start[: len(start) - more] + end[more:] for more in range(min(LONGEST, len(start)))]
    more = int(np.argmax([each.max() for each in sums]))
    token = int(sums[more].argmax())
    return Span(float(sums[more][token]), begins[token], window[ENDS][token + more]), no_answer


def _log_shares(logits: np.ndarray) -> np.ndarray:
    """Return the logarithms of a softmax."""
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
