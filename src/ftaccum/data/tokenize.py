"""Tokenize rows of raw text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from ..errors import DataError, SettingsError, TextWarning, warn_user
from .dataset import Rows
from .labels import label_id
from .text_columns import TextColumns, show
from .text_encoder import CUT, TextEncoder

_BLANK = "is_blank"  # a column of encoded rows, like CUT
_FIX = "Fix or drop the row."
_LONGEST_UNBOUNDED = 1_000_000  # tokenizers without a limit report a very large number


def tokenize(
    rows: Rows,
    columns: TextColumns,
    encoder: TextEncoder,
    config: Any,
    *,
    next_token: bool,
    warns: bool,
    n_processes: int = 1,
) -> Rows:
    """Return the rows as token ids, with labels. String labels become numbers by `config.label2id`.

    Args:
        next_token: whether rows predict their own tokens, as for a causal LM. Labels of whole rows are then dropped.
        warns: whether this process warns about rows. One of several processes should.
        n_processes: the number of processes that tokenize; with 1, this process does.

    Raises:
        DataError: naming the first row whose text cannot be tokenized, or whose label is unknown.

    Warns:
        TextWarning: if rows are truncated or have no text.
    """

    label = None if next_token else columns.label
    labels = (
        _LabelNames() if label is None else _LabelNames(*(getattr(config, f.name, None) for f in fields(_LabelNames)))
    )
    encode = _RowEncoder(rows.argument, rows.row_names, columns.texts, label, labels, encoder, next_token)
    read = [*columns.texts, *([columns.label] if columns.label is not None else [])]
    encoded = rows.encoded(encode, read, n_processes)
    return encoded.take_out((CUT, _BLANK), _Report(rows, columns, encoder) if warns else None)


@dataclass(frozen=True)
class _LabelNames:
    """The names of a model's classes, as its config has them."""

    id2label: Mapping[int, str] | None = None
    label2id: Mapping[str, int] | None = None


@dataclass(frozen=True)
class _RowEncoder:
    """The function that tokenizes a batch of rows.

    `datasets` pickles it, to hash it and to send it to other processes. So it holds what decides the result, and no
    rows: two runs with the same tokenizer then find the same stored tokens.

    Attributes:
        row_names: for each position, the number by which messages name the row; None if it is the position.
    """

    argument: str
    row_names: Sequence[int] | None
    texts: Sequence[str]
    label: str | None
    labels: _LabelNames
    encoder: TextEncoder
    next_token: bool

    def __call__(self, table: Mapping[str, list], positions: Sequence[int]) -> dict[str, list]:
        numbers = positions if self.row_names is None else [self.row_names[position] for position in positions]
        names = [f"In `{self.argument}`, row {number}" for number in numbers]
        texts = [table[name] for name in self.texts]
        for name, values in zip(self.texts, texts, strict=True):
            refuse_other_than_text(name, values, names)
        encoded = _encode(self.encoder, texts, names)
        encoded[_BLANK] = [not all(text.strip() for text in row) for row in zip(*texts, strict=True)]
        if self.next_token:
            encoded["labels"] = encoded["input_ids"]
        elif self.label is not None:
            labels = zip(table[self.label], names, strict=True)
            encoded["labels"] = [label_id(value, name, self.labels) for value, name in labels]
        return encoded


class _Report:
    """Warnings about truncated rows and rows without text: one of each, with the number of rows."""

    def __init__(self, rows: Rows, columns: TextColumns, encoder: TextEncoder) -> None:
        self._rows = rows
        read = " or ".join(map(repr, columns.texts))
        self._sentences = {
            CUT: f"are longer than {encoder.limit} tokens, the limit of `max_length`, the tokenizer or the model, and "
            "are truncated. Split them first if the lost part matters.",
            _BLANK: f"have no text in {read}, or only spaces. Drop them if the model should not train on them.",
        }

    def __call__(self, flags: Mapping[str, Sequence[bool]], first: int) -> None:
        """Warn about rows.

        Args:
            flags: for each kind of warning, whether each row needs it.
            first: the position of the first row.
        """
        for kind in [kind for kind, flagged in flags.items() if any(flagged) and kind in self._sentences]:
            flagged = list(flags[kind])
            rows = f"the {len(flagged)} rows from row {first} on" if first else f"{len(flagged)} rows"
            which = f"{sum(flagged)} of {rows} (the first is {self._rows.name_of(first + flagged.index(True))})"
            warn_user(f"In `{self._rows.argument}`, {which} {self._sentences.pop(kind)}", TextWarning)


def refuse_other_than_text(column: str, values: Sequence[Any], names: Sequence[str]) -> None:
    """Raise DataError for a value that is not a string. A tokenizer takes a list for a pair, or for words."""
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str):
            raise DataError(f"{name} has {show(value)} instead of text in its column {column!r}. {_FIX}")


def _encode(encoder: TextEncoder, texts: Sequence[list[str]], names: Sequence[str]) -> dict[str, list]:
    """Return the tokens of columns of texts.

    Args:
        names: the names of the rows, to begin messages with.

    Raises:
        DataError: naming the first row that cannot be tokenized.
    """
    try:
        return encoder(texts)
    except Exception as error:
        for name, *row in zip(names, *texts, strict=True):
            try:
                encoder([[text] for text in row])
            except Exception as alone:
                raise DataError(f"{name} cannot be tokenized: {alone!r}. {_FIX}") from alone
        raise DataError(f"{names[0]} and later ones cannot be tokenized together: {error!r}. Tokenize them.") from error


def most_tokens(tokenizer: Any, config: Any, model: nn.Module | None) -> int | None:
    """Return the most tokens that the tokenizer and the model accept in a row; None if neither has a limit."""
    positions = getattr(config, "max_position_embeddings", None)
    for module in () if model is None else model.modules():
        # Models like RoBERTa count positions from the one after `padding_idx`.
        if isinstance(module, nn.Embedding) and module.num_embeddings == positions and module.padding_idx is not None:
            positions -= module.padding_idx + 1
            break
    limits = (getattr(tokenizer, "model_max_length", None), positions)
    return min((n for n in limits if n and 0 < n < _LONGEST_UNBOUNDED), default=None)  # XLNet has -1 for no limit


def token_limit(tokenizer: Any, config: Any, model: nn.Module | None, max_length: int | None) -> int | None:
    """Return the most tokens of a row: `max_length`, or what the tokenizer and the model accept if that is less.

    Raises:
        SettingsError: if `max_length` is more than they accept.
    """
    accepted = most_tokens(tokenizer, config, model)
    if max_length is not None and accepted is not None and max_length > accepted:
        raise SettingsError(
            [f"`max_length` is {max_length}, but the tokenizer and the model accept at most {accepted} tokens."]
        )
    return accepted if max_length is None else max_length
