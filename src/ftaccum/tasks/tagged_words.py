"""Turn words and their tags into tokens and labels."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ..data.text_encoder import preserve_truncation
from ..objective.item_counts import IGNORE_INDEX
from .tags import tags_of, words_of

CUT, N_LOST = "was_cut", "n_lost"  # columns of encoded rows: whether a row was truncated, and its words without tokens


@dataclass(frozen=True)
class TaggedWords:
    """Turns words into tokens, and their tags into labels: the first token of a word has its label, the others -100.

    A row is tokenized as one text, with a space between words. Tokenizers such as RoBERTa's mark words by the space
    before them, and would take separate words for parts of one.

    Attributes:
        tokenizer: a fast tokenizer.
        limit: the most tokens of a row; None for no limit.
        numbers: the number of each tag by its name; None if there are no tags.
        given: the names that the data give to the numbers of their tags, if they do.
    """

    tokenizer: Any
    limit: int | None
    numbers: Mapping[str, int] | None = None
    given: tuple[str, ...] | None = None

    def __call__(self, batch: Mapping[str, list[Any]], rows: Sequence[int] = ()) -> dict[str, list[Any]]:  # noqa: ARG002
        """Return the tokenizer's columns, `labels` if there are tags, `CUT` and `N_LOST`."""
        texts = [words_of(words) for words in batch["tokens"]]
        encoded, places = self._tokenize(texts)
        columns = {name: list(values) for name, values in encoded.items()}
        columns[CUT] = [bool(encoding.overflowing) for encoding in encoded.encodings]
        columns[N_LOST] = [len(words) - len(set(found) - {None}) for words, found in zip(texts, places, strict=True)]
        if self.numbers is not None:
            tags = [[self.numbers[tag] for tag in tags_of(row, self.given)] for row in batch["tags"]]
            columns["labels"] = [
                [IGNORE_INDEX if place is None else row[place] for place in found]
                for row, found in zip(tags, places, strict=True)
            ]
        return columns

    def first_tokens(self, rows: Sequence[Sequence[str]]) -> list[list[int | None]]:
        """Return the position of the first token of each word of each row; None for words without tokens."""
        found = []
        for words, places in zip(rows, self._tokenize(rows)[1], strict=True):
            positions = {place: position for position, place in enumerate(places) if place is not None}
            found.append([positions.get(n) for n in range(len(words))])
        return found

    def _tokenize(self, rows: Sequence[Sequence[str]]) -> tuple[Any, list[list[int | None]]]:
        """Return the tokenizer's output, and for each token the word that it is the first token of, or None."""
        with preserve_truncation(self.tokenizer):
            encoded = self.tokenizer(
                [" ".join(words) for words in rows],
                truncation=self.limit is not None,
                max_length=self.limit,
                return_offsets_mapping=True,
            )
        offsets = encoded.pop("offset_mapping")
        return encoded, [_words_begun(words, spans) for words, spans in zip(rows, offsets, strict=True)]


def _words_begun(words: Sequence[str], spans: Sequence[tuple[int, int]]) -> list[int | None]:
    """Return for each token the number of the word that it is the first token of, or None.

    A token belongs to the word of its last character: it may begin with the space before it.

    Args:
        words: the words, which are joined by spaces.
        spans: the first character of each token in the joined text, and the one after its last.
    """
    starts = list(accumulate((len(word) + 1 for word in words), initial=0))
    begun: list[int | None] = []
    seen: set[int] = set()
    for start, end in spans:
        word = bisect_right(starts, end - 1) - 1
        is_inside = start < end and end - 1 < starts[word] + len(words[word])
        is_first = is_inside and word not in seen
        seen |= {word} if is_inside else set()
        begun.append(word if is_first else None)
    return begun
