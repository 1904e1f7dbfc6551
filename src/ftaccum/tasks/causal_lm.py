"""Next-token prediction on plain text."""

from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM

from ..data.encode_table import encode_table
from ..data.text_columns import choose_columns
from ..data.tokenize import token_limit
from ..errors import DataError, refuse
from ..planning.shuffle import hold_out
from ..runtime.log import logger
from ..settings.recipe import Recipe
from .columns import naming
from .generated_text import generated_columns, generation_arguments
from .packed_rows import BLANK, PACKED_COLUMNS, DocumentEncoder, pack
from .plain_text import PlainText
from .reading_direction import faults_of_reading_direction
from .row_warnings import warn_of_rows
from .task import EncodingOptions
from .token_accuracy import TokenAccuracy, accuracy_arguments


class CausalLM(PlainText):
    """Next-token prediction on plain text, with an end-of-text token after each row.

    Rows are cut to `max_length` tokens. With `packing`, they are joined and split into rows of this length.
    """

    model_class = AutoModelForCausalLM
    metrics = TokenAccuracy.NAMES

    _tokens: Dataset  # of the texts that were packed last, a text per row
    _limit: int

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        refuse(self._faults(EncodingOptions(recipe.text_columns, recipe.max_length)))

    def encode(self, rows: Any, argument: str, processor: Any, model: Any, options: EncodingOptions) -> Any:
        refuse(self._faults(options) + faults_of_reading_direction(model))
        texts = super().encode(rows, argument, processor, model, options)
        if not self.named.packing:
            return texts
        limit = token_limit(processor, model.config, model, options.max_length)
        assert limit is not None, "checked above"
        columns = choose_columns(texts, argument, None, next_token=True)
        end = processor.eos_token_id if options.add_eos_token else None
        encode = DocumentEncoder(columns.texts[0], argument, processor, end)
        tokens = encode_table(texts, encode, options.n_processes, argument)
        self._tokens, self._limit = tokens, limit
        packed = pack(tokens, argument, limit)
        warn_of_rows(
            argument, tokens[BLANK], "have no text, or only spaces. Drop them if the model should not train on them."
        )
        ended = "" if end is None else f", which end in {processor.decode([end])!r}"
        logger.info(
            f"{columns.describe()}; packed {len(texts)} texts of `{argument}`{ended}, into {len(packed)} rows of "
            f"{limit} tokens ({', '.join(PACKED_COLUMNS)})"
        )
        return packed

    def hold_out(self, rows: Any, encoded: Any, share: float, seed: int) -> tuple[Any, Dataset | None]:
        """Hold out whole texts, if several are packed, so that no text is in both parts; else leave it to the run."""
        if not self.named.packing or len(self._tokens) < 2:
            return super().hold_out(rows, encoded, share, seed)
        texts = [self._tokens.select(part) for part in hold_out(len(self._tokens), share, seed)]
        train, held = (pack(each, "train_data", self._limit) for each in texts)
        logger.info(
            f"`validation_split` holds out {len(texts[1]):,} texts: {len(train):,} and {len(held):,} packed rows"
        )
        return train, held

    def evaluation_arguments(self, processor: Any, model: Any) -> dict[str, Any]:  # noqa: ARG002
        return accuracy_arguments(next_token=True)

    def encode_inputs(self, rows: Dataset, processor: Any, model: Any, options: EncodingOptions) -> Dataset:
        """Return the tokens of each text, which the model continues."""
        texts = super().encode(rows, "data", processor, model, options)
        columns = choose_columns(texts, "data", options.text_columns, next_token=True)
        limit = token_limit(processor, model.config, model, options.max_length)
        encode = DocumentEncoder(columns.texts[0], "data", processor, None)
        tokens = encode_table(texts, encode, options.n_processes, "data").remove_columns([BLANK])
        too_long = next((n for n, ids in enumerate(tokens["input_ids"]) if limit and len(ids) > limit), None)
        if too_long is not None:
            raise DataError(f"In `data`, row {too_long} has more than {limit} tokens. Shorten it.")
        return tokens

    def prediction_arguments(self, processor: Any, model: Any, max_new_tokens: int | None) -> dict[str, Any]:  # noqa: ARG002
        return generation_arguments(max_new_tokens)

    def predicted_columns(self, predictions: Any, rows: Dataset, processor: Any, model: Any) -> dict[str, list[Any]]:  # noqa: ARG002
        return generated_columns(predictions, processor)

    def _faults(self, options: EncodingOptions) -> list[str]:
        if not self.named.packing:
            return []
        faults = []
        if options.max_length is None:
            faults.append("`packing` needs `max_length`, the number of tokens of a row, such as `max_length=1024`.")
        if self.named.streaming:
            faults.append("`packing` reads all texts, but `streaming` is on. Leave one of them out.")
        if options.text_columns is not None:
            faults.append(
                f"`text_columns` names {', '.join(map(repr, options.text_columns))}, but `packing` turns the texts "
                f"into tokens before. Name the column by its role: {naming('text', options.text_columns[0])}."
            )
        return faults
