"""The choice of the columns of raw text that a run reads: those that the user names, or the only one."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Json, LargeList, List, Translation, TranslationVariableLanguages, Value

from ..errors import DataError, listed
from .dataset import Rows
from .labels import LABELS

_FEW = 8  # rows to look at, since the first may have no text
_NAMED = 8  # the most columns to name in a message
_SAMPLE = 100  # rows to find the column with the longest texts
_STRINGS = ("string", "large_string", "string_view")
_BYTES = ("binary", "large_binary", "binary_view")


class _Sample(reprlib.Repr):
    """A `repr` that shortens a value of a column."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 40
        self.maxlist = self.maxdict = 3


show = _Sample().repr


@dataclass(frozen=True)
class TextColumns:
    """The columns of raw text that a run reads.

    Attributes:
        texts: the column of the texts; two columns for pairs of texts.
        label: the column of the labels; None if there is none, or if the texts are their own targets.
        left_out: the other columns.
    """

    texts: tuple[str, ...]
    label: str | None
    left_out: tuple[str, ...]

    def describe(self) -> str:
        """Return the banner's line about the columns."""
        columns = f"column {self.texts[0]!r}" if len(self.texts) == 1 else f"pairs of columns {_listed(self.texts)}"
        label = f"; labels: {self.label!r}" if self.label else ""
        left_out = f"; left out: {_listed(self.left_out)}" if self.left_out else ""
        return f"Text: {columns}{label}{left_out}"


def is_raw_text(rows: Rows, accepted: set[str] | None, named: Sequence[str] | None, *, has_collator: bool) -> bool:
    """Return whether rows hold text, and nothing that the model takes.

    Args:
        accepted: the columns that the model takes; None if it takes any.
        named: the user's `text_columns`.
        has_collator: whether the user gives a collator, which may read lists of words or conversations.
    """
    few = rows.fetch(range(min(_FEW, len(rows))))
    if not all(isinstance(row, Mapping) for row in few):
        return False
    columns = few[0].keys() - set(LABELS)
    values = {name: [row[name] for row in few if row.get(name) is not None] for name in columns}
    texts = {name for name in columns if values[name] and _is_text(values[name][0], nested=not has_collator)}
    others = columns - texts
    takes_all = accepted is None and named is None
    return bool(texts or named) and not (others if takes_all else others & {"input_ids", *(accepted or ())})


def choose_columns(table: Dataset, argument: str, named: Sequence[str] | None, *, next_token: bool) -> TextColumns:
    """Return the columns to read: those that the user names, or the only one that holds text.

    Args:
        argument: the argument that the table came from, for messages.
        named: the user's `text_columns`.
        next_token: whether rows predict their own tokens, as for a causal LM.

    Raises:
        DataError: if it is not clear which columns to read, or if they hold no text.
    """
    found = {name: feature for name, feature in table.features.items() if name not in LABELS and _holds_text(feature)}
    if named is None and (len(found) != 1 or not _is_string(*found.values())):
        raise DataError(_ask_for_names(table, argument, found, next_token=next_token))
    texts = tuple(found if named is None else named)
    label = next((name for name in LABELS if name in table.column_names and not next_token), None)
    for name in texts:
        check_column(table, argument, name, label)
    if next_token and len(texts) > 1:
        raise DataError(
            f"`text_columns` names {_listed(texts)}, but a causal LM trains on one text. "
            f"{_name_one(table, texts, pairs=False)} {_PROMPTS}"
        )
    others = tuple(name for name in table.column_names if name not in (*texts, label))
    return TextColumns(texts, label, others)


_PROMPTS = "To train only on the answers to prompts, tokenize first, with labels of -100 on the prompt."


def _ask_for_names(table: Dataset, argument: str, found: Mapping[str, Any], *, next_token: bool) -> str:
    samples = {name: _first_value(table, name) for name in found}
    named = listed([f"{name!r} ({show(value)})" for name, value in samples.items()], _NAMED)
    heading = "one column" if len(found) == 1 else f"{len(found)} columns"
    strings = [name for name, feature in found.items() if _is_string(feature)]
    remedies = [_name_one(table, strings, pairs=not next_token)] if strings else []
    if next_token and len(strings) > 1:
        remedies.append(_PROMPTS)
    remedies += filter(None, (_advice(repr(name), value) for name, value in samples.items()))
    return " ".join([f"`{argument}` has {heading} of text: {named}.", *remedies])


def _name_one(table: Dataset, names: Sequence[str], *, pairs: bool) -> str:
    """Return advice to name a column. Its example is the column with the longest texts."""
    sample = table.select_columns(list(names))[:_SAMPLE]
    longest = max(names, key=lambda name: sum(len(text) for text in sample[name] if isinstance(text, str)))
    or_two = ", or two for pairs of texts" if pairs and len(names) > 1 else ""
    return f"Name the one to train on, such as `text_columns={longest!r}`{or_two}."


def check_column(
    table: Dataset, argument: str, name: str, label: str | None = None, option: str = "text_columns"
) -> None:
    """Raise DataError if a column cannot be read as text, or is that of the labels.

    Args:
        option: the option that names the column, for messages.
    """
    if name not in table.column_names:
        raise DataError(
            f"`{argument}` has no column {name!r} to read texts from, only {_listed(table.column_names)}. Name one of "
            f"these with `{option}`."
        )
    if name == label:
        raise DataError(f"`text_columns` names {name!r}, which is the column of the labels. Name the column of texts.")
    value = _first_value(table, name)
    if value is not None and not isinstance(value, str):
        remedy = _advice("it", value) or "Name the column of texts."
        raise DataError(f"Column {name!r} of `{argument}` holds {show(value)} instead of text. {remedy}")


def _first_value(table: Dataset, name: str) -> Any:
    values = table.select_columns([name])[:_SAMPLE][name]
    return next((value for value in values if value is not None), None)


def _advice(what: str, value: Any) -> str:
    """Return a sentence on how to train on values that hold text but are not strings; for others, an empty string."""
    inner = value[0] if isinstance(value, list) and value else value
    if isinstance(value, str):
        return ""
    if isinstance(inner, Mapping):
        return f"To train on {what}, turn it into text first: conversations with `tokenizer.apply_chat_template`."
    if isinstance(inner, str):
        return f"To train on {what}, tokenize first, with `tokenizer(words, is_split_into_words=True)`."
    return f"To train on {what}, decode the bytes first." if isinstance(value, bytes) else ""


def _is_text(value: Any, *, nested: bool) -> bool:
    if isinstance(value, str):
        return True
    if not nested:
        return False
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, bytes) or any(_is_text(part, nested=True) for part in parts)


def _is_string(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in _STRINGS


def _holds_text(feature: Any) -> bool:
    """Return whether a column holds text, also if it is nested in lists or dicts."""
    if isinstance(feature, Value):
        return feature.dtype in _STRINGS + _BYTES
    if isinstance(feature, List | LargeList):
        return _holds_text(feature.feature)
    if isinstance(feature, dict):
        return any(map(_holds_text, feature.values()))
    return isinstance(feature, Json | Translation | TranslationVariableLanguages)


def _listed(names: Sequence[str]) -> str:
    return listed([*map(repr, names)], _NAMED)
