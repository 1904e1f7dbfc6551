"""Tokenize several columns of texts, each into columns of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from ..runtime.library_output import library_bars
from .convert import as_rows
from .text_columns import check_column
from .text_encoder import preserve_truncation
from .tokenize import refuse_other_than_text, token_limit


def tokenize_columns(
    rows: Any,
    tokenizer: Any,
    columns: Mapping[str, str],
    *,
    model: Any = None,
    max_length: int | None = None,
    **options: Any,
) -> Dataset:
    """Tokenize several columns of texts, each into columns with a prefix.

    `test_fine_tuning` pads the tokens of each text to its longest row.

        rows = tokenize_columns(rows, tokenizer, {"chosen": "answer", "rejected": "other"})
        rows.column_names  # chosen_input_ids, chosen_attention_mask, rejected_input_ids, rejected_attention_mask, …

    Args:
        rows: rows with columns of texts: a `datasets.Dataset`, a list of dicts, a DataFrame or a dict of columns.
        tokenizer: the tokenizer.
        columns: for each prefix, the column of texts.
        model: the model; its `config` may limit the number of tokens.
        max_length: the most tokens of a text, the others being cut off; None: as many as the tokenizer and the model
            accept.
        **options: further arguments of the tokenizer, such as `add_special_tokens=False`.

    Returns:
        The rows with the tokenizer's columns in place of the texts. Other columns stay.

    Raises:
        DataError: if a column is missing, or a row has no text in it. It names the row.
        SettingsError: if `max_length` is more than the tokenizer and the model accept.
    """
    table = as_rows(rows, "rows").table
    texts = sorted(set(columns.values()))
    for column in texts:
        check_column(table, "rows", column, option="columns")
    limit = token_limit(tokenizer, getattr(model, "config", None), model, max_length)

    def encoded(table: Mapping[str, list[Any]], positions: Sequence[int]) -> dict[str, Any]:
        for column in texts:
            refuse_other_than_text(column, table[column], [f"In `rows`, row {position}" for position in positions])
        found = {
            prefix: tokenizer(table[column], truncation=limit is not None, max_length=limit, **options)
            for prefix, column in columns.items()
        }
        return {f"{prefix}_{name}": values for prefix, tokens in found.items() for name, values in tokens.items()}

    with preserve_truncation(tokenizer), library_bars(shown=False):
        return table.map(encoded, batched=True, with_indices=True, remove_columns=texts, load_from_cache_file=False)
