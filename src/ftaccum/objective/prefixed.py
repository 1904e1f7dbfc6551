"""Names of columns of several texts in a row, such as `chosen_input_ids` and `rejected_input_ids`.

Each text has a length of its own.
"""

from collections.abc import Container, Iterable

from .item_counts import TOKEN_COLUMNS

_IDS = "_input_ids"
_ENDINGS = (*(f"_{column}" for column in TOKEN_COLUMNS), "_labels")


def ids_of(name: str) -> str | None:
    """Return the name of the token ids that a column belongs to, if both names have the same prefix.

    `chosen_attention_mask`, `chosen_labels` and `chosen_input_ids` itself belong to `chosen_input_ids`. Return None for
    columns without a prefix, and for those of a decoder, which run along the labels.
    """
    ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
    return None if ending is None or name.startswith("decoder_") else name.removesuffix(ending) + _IDS


def mask_of(ids: str) -> str:
    """Return the name of the attention mask over token ids, which has the same prefix."""
    return ids.removesuffix("input_ids") + "attention_mask"


def length_columns(names: Iterable[str]) -> list[str]:
    """Return the names of the columns of token ids: `input_ids`, or else all with a prefix."""
    known = list(names)
    return ["input_ids"] if "input_ids" in known else [name for name in known if ids_of(name) == name]


def is_tokens_column(name: str, names: Container[str]) -> bool:
    """Return whether a column has a number for each token, whose values tell nothing about the kind of a row.

    Args:
        names: the names of all columns.
    """
    return name in TOKEN_COLUMNS or ids_of(name) in names
