"""The training and validation rows: converts the user's data, tokenizes text and holds out validation rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from ..data.convert import as_rows, synthetic_rows
from ..data.dataset import Rows
from ..data.iterable import Stream, StreamRows
from ..data.labels import settle_labels
from ..data.text_columns import TextColumns, choose_columns, is_raw_text
from ..data.text_encoder import TextEncoder
from ..data.tokenize import token_limit, tokenize
from ..errors import DataError, refuse
from ..objective.model_forward import accepted_arguments
from ..planning.shuffle import hold_out
from ..settings.recipe import Recipe
from ..settings.runtime import Runtime
from ..tasks.reading_direction import faults_of_reading_direction
from .config import Components, RunConfig


@dataclass(frozen=True)
class RunRows:
    """The rows of a run, with text converted to tokens.

    Attributes:
        train: rows to train on.
        val: rows to validate on, if any.
        notes: lines for the banner: which text columns are read.
        text_columns: the columns that texts are read from; empty if the rows are no raw text.
    """

    train: Rows
    val: Rows | None
    notes: tuple[str, ...] = ()
    text_columns: tuple[str, ...] = ()

    @property
    def all(self) -> list[Rows]:
        """The training rows, and the validation rows if there are any."""
        return [rows for rows in (self.train, self.val) if rows is not None]


def build_rows(config: RunConfig, accelerator: Accelerator, stream: Stream | None) -> RunRows:
    """Return the training and validation rows, tokenized.

    Args:
        stream: the training data, if they are a stream.

    Raises:
        DataError: if the data are not rows, or are raw text that cannot be tokenized.
        SettingsError: if the model should learn to predict the next token of raw text, but sees it.
    """
    components, recipe = config.components, config.recipe
    reader = _TextReader(components, recipe, config.runtime, accelerator)
    given = None if components.val_data is None else as_rows(components.val_data, "val_data")
    if stream is None and components.train_data is None:
        rows, text = _synthetic(components.configuration, recipe.random_seed), None
    else:
        raw = as_rows(components.train_data, "train_data") if stream is None else StreamRows(stream)
        rows, text = reader.read(raw, recipe.text_columns)
    val, val_text = None, None
    if given is not None:
        val, val_text = reader.read(given, recipe.text_columns if text is None else text.texts)
    if text is None and val_text is None and recipe.text_columns is not None:
        raise DataError(_no_text(rows, recipe.text_columns))
    columns = text or val_text
    notes = () if columns is None else (reader.describe(columns),)
    texts = () if columns is None else columns.texts
    if given is not None or stream is not None:
        return RunRows(rows, val, notes, texts)
    kept, held = hold_out(len(rows), recipe.validation_split, recipe.random_seed)
    part = f"The part that `validation_split` ({recipe.validation_split}) holds out of "
    return RunRows(rows.subset(kept), rows.subset(held, part) if held else None, notes, texts)


def _synthetic(config: Any, seed: int) -> Rows:
    vocab_size = getattr(config, "vocab_size", None)
    if not isinstance(vocab_size, int):
        raise DataError(
            "`train_data` is None, and `config` has no `vocab_size` to draw synthetic token ids from. "
            "Give training data, or a config with a `vocab_size`."
        )
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "block_size"))
    return synthetic_rows(vocab_size, next((n for n in limits if isinstance(n, int)), None), seed)


def _no_text(rows: Rows, named: Sequence[str]) -> str:
    row = rows.fetch([0])[0]
    carried = f"columns {', '.join(map(repr, row))}" if isinstance(row, Mapping) else "tensors"
    return (
        f"`text_columns` names {', '.join(map(repr, named))}, but `{rows.argument}` is not raw text: its first row has "
        f"{carried}. Leave `text_columns` out, or drop the columns that the model takes, such as `input_ids`."
    )


@dataclass(frozen=True)
class _TextReader:
    """Tokenizes the rows of a run that are raw text."""

    components: Components
    recipe: Recipe
    runtime: Runtime
    accelerator: Accelerator

    @property
    def end(self) -> int | None:
        """The token that ends each row of a causal LM; None if there is none."""
        if not (self.components.is_causal_lm and self.recipe.add_eos_token):
            return None
        return getattr(self.components.tokenizer, "eos_token_id", None)

    def read(self, rows: Rows, named: Sequence[str] | None) -> tuple[Rows, TextColumns | None]:
        """Return the rows, tokenized, and their text columns; None for the columns if the rows are not raw text.

        Args:
            named: the names of the text columns; None to find them.
        """
        tokenizer, model, config = self.components.tokenizer, self.components.model, self.components.configuration
        has_collator = self.components.data_collator is not None
        if not is_raw_text(rows, accepted_arguments(model), named, has_collator=has_collator):
            own_loss = self.components.loss_fn is None
            return rows if has_collator else settle_labels(rows, config, own_loss=own_loss), None
        if tokenizer is None and has_collator and named is None:  # the user's collator may tokenize
            return rows, None
        if tokenizer is None:
            raise DataError(
                f"`{rows.argument}` is raw text, but `tokenizer` is None. Give the model's tokenizer, or tokenize "
                "first."
            )
        if self.components.is_causal_lm:
            refuse(faults_of_reading_direction(model))
        columns = choose_columns(rows.table, rows.argument, named, next_token=self.components.is_causal_lm)
        encoder = TextEncoder(tokenizer, token_limit(tokenizer, config, model, self.recipe.max_length), self.end)
        is_main = self.accelerator.is_main_process
        with self.accelerator.main_process_first():  # the other processes then find the cached table
            tokenized = tokenize(
                rows,
                columns,
                encoder,
                config,
                next_token=self.components.is_causal_lm,
                warns=is_main,
                n_processes=self.runtime.preprocessing_num_workers or 1,
            )
        return tokenized, columns

    def describe(self, columns: TextColumns) -> str:
        """Return the banner's line about the text columns."""
        if not self.components.is_causal_lm or not self.recipe.add_eos_token:
            return columns.describe()
        if self.end is None:
            return f"{columns.describe()}; rows have no end-of-text token, because the tokenizer has none"
        return f"{columns.describe()}; rows end in {self.components.tokenizer.decode([self.end])!r}"
