"""Turn texts into token ids, truncated at a limit and ended by an end-of-text token."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

CUT = "was_cut"  # a column that `TextEncoder` adds to the tokenizer's

_Tokens = dict[str, list]  # of one row, by column


@dataclass(frozen=True)
class TextEncoder:
    """An encoder of texts to token ids, in rows that are no longer than the model accepts.

    The rows of a causal LM end in the end-of-text token, so that the model learns to stop. Rows whose end was cut off
    do not.

    Attributes:
        tokenizer: the user's tokenizer.
        limit: the most tokens of a row; None for no limit.
        end: the id of the token that rows end in; None to end them as the tokenizer does.
    """

    tokenizer: Callable[..., Mapping[str, list]]
    limit: int | None
    end: int | None

    def __call__(self, texts: Sequence[list[str]]) -> dict[str, list]:
        """Return the tokenizer's columns, and a column `CUT`: whether each row was truncated.

        Args:
            texts: one column of texts, or two for pairs.
        """
        # Allow one token more than fits, to see which rows are too long.
        rows = self._tokenize(texts, None if self.limit is None else self.limit + 1)
        cut = [self.limit is not None and self._length(row) > self.limit for row in rows]
        if any(cut):
            shorter = iter(self._cut([list(itertools.compress(column, cut)) for column in texts]))
        rows = [next(shorter) if is_cut else self._with_end(row) for row, is_cut in zip(rows, cut, strict=True)]
        return {**{name: [row[name] for row in rows] for name in rows[0]}, CUT: cut}

    def _cut(self, texts: Sequence[list[str]]) -> list[_Tokens]:
        """Return the tokens of texts that are too long, truncated."""
        assert self.limit is not None
        if self.end is None:
            return self._tokenize(texts, self.limit)
        if getattr(self.tokenizer, "truncation_side", "right") == "left":
            return [self._with_end(row) for row in self._tokenize(texts, self.limit - 1)]
        return [self._without_end(row) for row in self._tokenize(texts, self.limit)]

    def _with_end(self, row: _Tokens) -> _Tokens:
        if not self._lacks_end(row):
            return row
        tokens = {"input_ids": self.end, "attention_mask": 1}
        return {name: [*values, tokens.get(name, 0)] for name, values in row.items()}

    def _without_end(self, row: _Tokens) -> _Tokens:
        return row if self._lacks_end(row) else {name: values[:-1] for name, values in row.items()}

    def _length(self, row: _Tokens) -> int:
        return len(row["input_ids"]) + int(self._lacks_end(row))

    def _lacks_end(self, row: _Tokens) -> bool:
        return self.end is not None and list(row["input_ids"][-1:]) != [self.end]

    def _tokenize(self, texts: Sequence[list[str]], limit: int | None) -> list[_Tokens]:
        with preserve_truncation(self.tokenizer):
            encoded = self.tokenizer(*texts, truncation=limit is not None, max_length=limit)
        return [dict(zip(encoded.keys(), values, strict=True)) for values in zip(*encoded.values(), strict=True)]


@contextmanager
def preserve_truncation(tokenizer: Any) -> Iterator[None]:
    """Keep the truncation setting of a fast tokenizer, which each call would change, and which is saved with it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield
        return
    before = backend.truncation
    try:
        yield
    finally:
        if before is None:
            backend.no_truncation()
        else:
            backend.enable_truncation(**before)
