"""Raw text to token ids."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from torch import nn

from ..errors import DataError
from .dataset import Rows
from .labels import label_id

_LABELS = ("labels", "label")
_MEND = "Mend or drop the row."
_LONGEST_UNBOUNDED = 1_000_000  # tokenizers without a limit give a very large number as their limit


def is_raw_text(rows: Rows, accepted: set[str] | None) -> bool:
    """Whether rows carry text, and nothing that the model takes.

    Args:
        accepted: the columns that the model takes; None where it takes any.
    """
    first = rows.fetch([0])[0]
    if not isinstance(first, Mapping):
        return False
    inputs = {key: value for key, value in first.items() if key not in _LABELS}
    texts = {key for key, value in inputs.items() if isinstance(value, str)}
    usable = {"input_ids", *(accepted or ())} if accepted is not None else inputs.keys() - texts
    return bool(texts) and not usable & (inputs.keys() - texts)


def tokenize(rows: Rows, tokenizer: Any, config: Any, model: nn.Module, *, next_token: bool) -> Rows:
    """Tokenises raw text: the column `text`, else the one or two columns that hold strings (a pair).

    Longer texts are cut at the shorter of the tokenizer's and the model's limit. Labels given as strings become
    numbers by the model's `config.label2id`.

    Args:
        next_token: whether rows are to predict their own tokens, as for a causal LM; labels of whole rows are then
            left aside.

    Raises:
        DataError: without a tokenizer, and where the text or the labels cannot be made out.
    """
    if tokenizer is None:
        raise DataError(
            f"`{rows.argument}` is raw text, but `tokenizer` is None. Give the model's tokenizer, or tokenise first."
        )
    table = rows.as_table()  # of a stream, the rows that are looked at
    texts = _text_columns(table, rows.argument)
    label = next((name for name in _LABELS if name in table.column_names), None)
    limit = most_tokens(tokenizer, config, model)

    def tokens(*columns: list[str]) -> dict[str, list]:
        return dict(tokenizer(*columns, truncation=limit is not None, max_length=limit))

    def encode(columns: Mapping[str, list], positions: Sequence[int]) -> dict[str, list]:
        names = [f"Of `{rows.argument}`, {rows.name_of(position)}" for position in positions]
        encoded = _encoded(tokens, {name: columns[name] for name in texts}, names)
        if next_token:
            encoded["labels"] = encoded["input_ids"]
        elif label is not None:
            encoded["labels"] = [
                label_id(value, name, config) for value, name in zip(columns[label], names, strict=True)
            ]
        return encoded

    columns = [*texts, *([label] if label is not None else [])]
    return rows.encoded(encode, columns, f"Tokenising {rows.argument}")


def _encoded(
    tokens: Callable[..., dict[str, list]], texts: Mapping[str, list], names: Sequence[str]
) -> dict[str, list]:
    """What a tokenizer makes of columns of texts.

    Args:
        names: of the rows, as sentences on them begin.

    Raises:
        DataError: naming the first row that cannot be tokenised.
    """
    for column, values in texts.items():
        for name, value in zip(names, values, strict=True):
            if not isinstance(value, str):  # of a list a tokenizer would make a pair, or tokens of its own
                raise DataError(f"{name} has no text in its column {column!r}, but {value!r}. {_MEND}")
    try:
        return tokens(*texts.values())
    except Exception as error:
        for name, *row in zip(names, *texts.values(), strict=True):
            try:
                tokens(*([text] for text in row))
            except Exception as alone:
                raise DataError(f"{name} cannot be tokenised: {alone!r}. {_MEND}") from alone
        raise DataError(f"{names[0]} and those behind it cannot be tokenised: {error!r}. Tokenise first.") from error


def _text_columns(table: Dataset, argument: str) -> list[str]:
    strings = [
        name
        for name, feature in table.features.items()
        if getattr(feature, "dtype", "") in ("string", "large_string") and name not in _LABELS
    ]
    if "text" in strings:
        return ["text"]
    if len(strings) in (1, 2):
        return strings
    raise DataError(
        f"`{argument}` has the text columns {strings}; which to read is not clear. Name one `text`, keep one (or two, "
        "for pairs), or tokenise first."
    )


def most_tokens(tokenizer: Any, config: Any, model: nn.Module) -> int | None:
    """The most tokens of a row that tokenizer and model take; None where neither has a limit."""
    positions = getattr(config, "max_position_embeddings", None)
    for module in model.modules():
        # RoBERTa and its kin number positions from behind the padding's on.
        if isinstance(module, nn.Embedding) and module.num_embeddings == positions and module.padding_idx is not None:
            positions -= module.padding_idx + 1
            break
    limits = (getattr(tokenizer, "model_max_length", None), positions)
    return min((n for n in limits if n and n < _LONGEST_UNBOUNDED), default=None)
