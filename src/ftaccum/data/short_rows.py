"""Rows cut to a few tokens, on which a loss takes less time to measure than on whole ones."""

from collections.abc import Mapping

import torch

from .columns import Along, Columns
from .row import Row

LONG_ENOUGH = 32  # tokens; a row up to this length is quick to measure, and is not cut
# Tokens of cut rows: unlike, also modulo 4, so that rows are padded and a model that takes tokens in fours shows it.
SHORT = (9, 12, 15, 18)
_COLUMNS = {"input_ids", "attention_mask", "token_type_ids", "labels"}


def cut_row(row: Row, columns: Columns | None, n_tokens: int, ignore_index: int) -> Row | None:
    """Return a row cut to at most `n_tokens` tokens around its first label that counts.

    Args:
        columns: the columns of a batch, if they are known.
        n_tokens: the most tokens to keep.
        ignore_index: the label that the loss ignores.

    Returns:
        The row; None if it must stay whole: if a batch has columns other than token ids, masks and a label for each
        token, which would not fit a part of a row, if no label of the part counts, or if the row has padding.
    """
    if (
        columns is None
        or not isinstance(row, Mapping)
        or not {"input_ids", "labels"} <= columns.sizes.keys() <= _COLUMNS
    ):
        return None
    if any(sizes != (Along.TOKENS,) for sizes in columns.sizes.values()):
        return None
    counts_L = torch.as_tensor(row[columns.keys["labels"]]) != ignore_index
    if not counts_L.any():
        return None
    start = max(0, min(int(counts_L.nonzero()[0]) - n_tokens // 2, len(counts_L) - n_tokens))
    if not counts_L[start + 1 : start + n_tokens].any():  # a causal model predicts no first token
        return None
    if "attention_mask" in columns.keys and not torch.as_tensor(row[columns.keys["attention_mask"]]).all():
        return None  # padding that a model takes in whole rows shows in these only
    return {key: row[key][start : start + n_tokens] for key in columns.keys.values()}
