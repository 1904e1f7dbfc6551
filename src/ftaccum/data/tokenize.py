"""Rows of raw text → rows of token ids."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import DataError, TextWarning, warn_user
from .dataset import Rows
from .labels import label_id
from .text_columns import TextColumns, show
from .text_encoder import CUT, TextEncoder

_BLANK = "is_blank"  # a column of encoded rows, like CUT
_FIX = "Fix or drop the row."
_LONGEST_UNBOUNDED = 1_000_000  # tokenizers without a limit give a very large number as their limit


def tokenize(
    rows: Rows, columns: TextColumns, encoder: TextEncoder, config: Any, *, next_token: bool, warns: bool
) -> Rows:
    """Return the tokens of raw text, with labels. Labels given as strings become numbers by `config.label2id`.

    Args:
        next_token: whether rows predict their own tokens, as for a causal LM; labels of whole rows are left out then.
        warns: whether to warn of rows, as one of several processes does.

    Raises:
        DataError: naming the first row whose text cannot be tokenised, or whose label is unknown.

    Warns:
        TextWarning: for rows that are cut, and for rows without text.
    """

    def encode(table: Mapping[str, list], positions: Sequence[int]) -> dict[str, list]:
        names = [f"Of `{rows.argument}`, {rows.name_of(position)}" for position in positions]
        texts = [table[name] for name in columns.texts]
        for name, values in zip(columns.texts, texts, strict=True):
            _refuse_other_than_text(name, values, names)
        encoded = _encode(encoder, texts, names)
        encoded[_BLANK] = [not all(text.strip() for text in row) for row in zip(*texts, strict=True)]
        if next_token:
            encoded["labels"] = encoded["input_ids"]
        elif columns.label is not None:
            labels = zip(table[columns.label], names, strict=True)
            encoded["labels"] = [label_id(value, name, config) for value, name in labels]
        return encoded

    read = [*columns.texts, *([columns.label] if columns.label is not None else [])]
    encoded = rows.encoded(encode, read, f"Tokenising {rows.argument}")
    return encoded.take_out((CUT, _BLANK), _Report(rows, columns, encoder) if warns else None)


class _Report:
    """Warns of rows that were cut, and of rows without text: once each, with their number."""

    def __init__(self, rows: Rows, columns: TextColumns, encoder: TextEncoder) -> None:
        self._rows = rows
        read = " or ".join(map(repr, columns.texts))
        self._sentences = {
            CUT: f"are longer than the {encoder.limit} tokens that tokenizer and model take, and are cut. Split them "
            "first if what is cut off matters.",
            _BLANK: f"have no text in {read}, or nothing but spaces. Drop them if they should not be trained on.",
        }

    def __call__(self, flags: Mapping[str, Sequence[bool]], first: int) -> None:
        """Warn of rows.

        Args:
            flags: for each kind, whether a row is of it.
            first: position of the first row.
        """
        for kind in [kind for kind, flagged in flags.items() if any(flagged) and kind in self._sentences]:
            flagged = list(flags[kind])
            rows = f"the {len(flagged)} rows from row {first} on" if first else f"{len(flagged)} rows"
            which = f"{sum(flagged)} of {rows} (the first is {self._rows.name_of(first + flagged.index(True))})"
            warn_user(f"Of `{self._rows.argument}`, {which} {self._sentences.pop(kind)}", TextWarning)


def _refuse_other_than_text(column: str, values: Sequence[Any], names: Sequence[str]) -> None:
    """Raise DataError for a value that is no string: of a list a tokenizer would make a pair, or tokens of its own."""
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str):
            raise DataError(f"{name} has no text in its column {column!r}, but {show(value)}. {_FIX}")


def _encode(encoder: TextEncoder, texts: Sequence[list[str]], names: Sequence[str]) -> dict[str, list]:
    """Return the tokens of columns of texts.

    Args:
        names: of the rows, as sentences on them begin.

    Raises:
        DataError: naming the first row that cannot be tokenised.
    """
    try:
        return encoder(texts)
    except Exception as error:
        for name, *row in zip(names, *texts, strict=True):
            try:
                encoder([[text] for text in row])
            except Exception as alone:
                raise DataError(f"{name} cannot be tokenised: {alone!r}. {_FIX}") from alone
        raise DataError(f"{names[0]} and those after it cannot be tokenised: {error!r}. Tokenise first.") from error


def most_tokens(tokenizer: Any, config: Any, model: nn.Module) -> int | None:
    """Return the most tokens of a row that tokenizer and model take; None if neither has a limit."""
    positions = getattr(config, "max_position_embeddings", None)
    for module in model.modules():
        # Models like RoBERTa begin to count positions after that of the padding.
        if isinstance(module, nn.Embedding) and module.num_embeddings == positions and module.padding_idx is not None:
            positions -= module.padding_idx + 1
            break
    limits = (getattr(tokenizer, "model_max_length", None), positions)
    return min((n for n in limits if n and 0 < n < _LONGEST_UNBOUNDED), default=None)  # -1 for none, in XLNet
