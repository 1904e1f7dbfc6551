"""Turn questions and contexts into tokens. Long contexts are split into windows that overlap."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.text_encoder import preserve_truncation

# Columns of windows that the model does not take: the row, the position of its first context token, the characters of
# the context where its context tokens begin and end, and the position of the token for no answer.
ROW, FIRST, BEGINS, ENDS, NOWHERE = "row", "first", "begins", "ends", "nowhere"
FOR_METRICS = (ROW, FIRST, BEGINS, ENDS, NOWHERE)


@dataclass(frozen=True)
class ContextWindows:
    """Turns questions and contexts into windows: rows of tokens with the question and a part of the context.

    Attributes:
        tokenizer: a fast tokenizer.
        limit: the most tokens of a window; None for no limit.
        stride: the number of tokens that neighboring windows share.
    """

    tokenizer: Any
    limit: int | None
    stride: int

    def __call__(self, batch: Mapping[str, list[Any]], rows: Sequence[int]) -> dict[str, list[Any]]:
        """Return the tokenizer's columns, those of `FOR_METRICS`, and the positions of the answers if there are any.

        The columns `start` and `end` of the batch are those of `Answers`. If a window does not contain the whole
        answer, its answer is the first token of the row (CLS), as for a question without an answer.

        Args:
            rows: the numbers of the rows of the batch.
        """
        with preserve_truncation(self.tokenizer):
            encoded = self.tokenizer(
                batch["question"],
                batch["context"],
                truncation=False if self.limit is None else "only_second",
                max_length=self.limit,
                stride=self.stride if self.limit is not None else 0,
                return_overflowing_tokens=self.limit is not None,
                return_offsets_mapping=True,
            )
        columns = {name: list(values) for name, values in encoded.items()}
        offsets = columns.pop("offset_mapping")
        sources = columns.pop("overflow_to_sample_mapping", list(range(len(rows))))
        spans = [_context_of(encoded.sequence_ids(n)) for n in range(len(offsets))]
        columns[ROW] = [rows[source] for source in sources]
        columns[FIRST] = [first for first, _ in spans]
        for name, side in ((BEGINS, 0), (ENDS, 1)):
            columns[name] = [
                [each[side] for each in found[first:last]] for found, (first, last) in zip(offsets, spans, strict=True)
            ]
        columns[NOWHERE] = [self._nowhere(ids) for ids in columns["input_ids"]]
        if "start" in batch:
            places = [
                _tokens_of(batch["start"][source], batch["end"][source], *window)
                for source, *window in zip(
                    sources, *(columns[name] for name in (FIRST, BEGINS, ENDS, NOWHERE)), strict=True
                )
            ]
            columns["start_positions"], columns["end_positions"] = map(list, zip(*places, strict=True))
        return columns

    def context_sizes(self, questions: Sequence[str]) -> list[int]:
        """Return the number of context tokens that fit in a window of each question."""
        assert self.limit is not None
        free = self.limit - self.tokenizer.num_special_tokens_to_add(pair=True)
        encoded = self.tokenizer(list(questions), add_special_tokens=False, verbose=False)
        return [free - len(ids) for ids in encoded["input_ids"]]

    def _nowhere(self, ids: Sequence[int]) -> int:
        token = getattr(self.tokenizer, "cls_token_id", None)
        return ids.index(token) if token in ids else 0


def _context_of(parts: Sequence[int | None]) -> tuple[int, int]:
    """Return the position of the first token of the second text, and the one after its last."""
    n_tokens = parts.count(1)
    first = parts.index(1) if n_tokens else len(parts)
    return first, first + n_tokens


def _tokens_of(
    start: int, end: int, first: int, begins: Sequence[int], ends: Sequence[int], nowhere: int
) -> tuple[int, int]:
    """Return the positions of the tokens where an answer begins and ends; both `nowhere` if a window lacks a part.

    Args:
        start, end: the first character of the answer, and the one after its last; -1 if there is none.
    """
    if start < 0 or not begins or start < begins[0] or end > ends[-1]:
        return nowhere, nowhere
    last_begin = max(n for n, begin in enumerate(begins) if begin <= start)
    first_end = min(n for n, each in enumerate(ends) if each >= end)
    return first + last_begin, first + max(last_begin, first_end)
