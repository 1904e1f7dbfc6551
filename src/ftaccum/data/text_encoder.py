"""Texts to token ids: cut at a limit, and ended."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

CUT = "was_cut"  # a column of `TextEncoder`, beside those of the tokenizer

_Tokens = dict[str, list]  # of one row, by column


@dataclass(frozen=True)
class TextEncoder:
    """Turns texts into token ids, in rows that are no longer than the model takes.

    A causal LM's row ends in the end-of-text token, so that the model learns to stop. A row whose end was cut off has
    none.

    Attributes:
        tokenizer: the user's.
        limit: the most tokens of a row; None for no limit.
        end: id of the token that rows end in; None leaves the end as the tokenizer makes it.
    """

    tokenizer: Callable[..., Mapping[str, list]]
    limit: int | None
    end: int | None

    def __call__(self, texts: Sequence[list[str]]) -> dict[str, list]:
        """Return the tokenizer's columns, and whether each row was cut.

        Args:
            texts: one column of texts, or two for pairs.
        """
        # One token more than fits shows which rows are longer.
        rows = self._tokenize(texts, None if self.limit is None else self.limit + 1)
        cut = [self.limit is not None and self._length(row) > self.limit for row in rows]
        if any(cut):
            shorter = iter(self._cut([list(itertools.compress(column, cut)) for column in texts]))
        rows = [next(shorter) if is_cut else self._with_end(row) for row, is_cut in zip(rows, cut, strict=True)]
        return {**{name: [row[name] for row in rows] for name in rows[0]}, CUT: cut}

    def _cut(self, texts: Sequence[list[str]]) -> list[_Tokens]:
        """Return the tokens of texts that are too long."""
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
        with _preserve_truncation(self.tokenizer):
            encoded = self.tokenizer(*texts, truncation=limit is not None, max_length=limit)
        return [dict(zip(encoded.keys(), values, strict=True)) for values in zip(*encoded.values(), strict=True)]


@contextmanager
def _preserve_truncation(tokenizer: Any) -> Iterator[None]:
    """Keep what a fast tokenizer truncates to, which it would otherwise take from each call and save with itself."""
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
