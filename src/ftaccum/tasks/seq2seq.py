"""Texts from texts with an encoder-decoder: summaries, translations, answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM

from ..data.encode_table import encode_table
from ..data.text_columns import show
from ..data.text_encoder import CUT, TextEncoder
from ..data.tokenize import most_tokens, token_limit
from ..errors import DataError, SettingsError, TextWarning, warn_user
from ..runtime.accelerator import is_first_process
from ..runtime.log import logger
from ..settings.recipe import Recipe
from .arguments import NamedArguments
from .columns import Role, naming
from .generated_text import generated_columns, generation_arguments
from .row_warnings import warn_of_rows
from .task import EncodingOptions, Task
from .text_metrics import TextMetrics, installed_metrics, missing_metrics

_TARGET_LENGTH = 128  # tokens, if neither the user nor the model's positions say otherwise
_CUT_TARGET, _BLANK_SOURCE, _BLANK_TARGET = "was_cut_target", "is_blank_source", "is_blank_target"
_SOURCES = ("source", "input", "text", "document", "article", "question", "dialogue", "src", "inputs", "sentence")
_TARGETS = ("target", "output", "summary", "highlights", "translation", "answer", "tgt", "targets", "label", "labels")


class Seq2Seq(Task):
    """Texts from texts, generated at evaluation."""

    roles: ClassVar[Mapping[str, Role]] = {"source": Role(_SOURCES), "target": Role(_TARGETS)}
    model_class = AutoModelForSeq2SeqLM
    targets = ("target",)

    def __init__(self, named: NamedArguments) -> None:
        super().__init__(named)
        self.metrics = installed_metrics()

    def check(self, recipe: Recipe) -> None:
        missing = missing_metrics()
        name = (recipe.metric_for_best or "").removeprefix("eval_")
        if name in missing:
            raise SettingsError(
                [
                    f"`metric_for_best` is {name!r}, but the package that computes it is not installed. Install it: "
                    f"`{missing[name]}`, or choose one of {', '.join(map(repr, self.metrics))}."
                ]
            )
        super().check(recipe)

    def head(self, train: Dataset) -> dict[str, Any]:
        _check_texts(train, "train_data")
        return {}

    def encode(self, rows: Dataset, argument: str, processor: Any, model: Any, options: EncodingOptions) -> Dataset:
        _check_texts(rows, argument)
        limit = token_limit(processor, model.config, model, options.max_length)
        longest = self._longest_target(model)
        has_targets = "target" in rows.column_names
        if has_targets and is_first_process():
            _warn_without_end(processor)
        table = rows.select_columns(["source", "target"] if has_targets else ["source"])
        encode = _Encoder(processor, self.named.source_prefix or "", limit, longest)
        encoded = encode_table(table, encode, options.n_processes, argument)
        drop = "Drop them if the model should not train on them."
        sentences = {
            CUT: f"have sources of more than {limit} tokens, the limit of `max_length`, the tokenizer or the model, "
            "and are truncated.",
            _CUT_TARGET: f"have targets of more than {longest} tokens, the limit of `max_target_length` or the model, "
            "and are truncated.",
            _BLANK_SOURCE: f"have no text as their source, or only spaces. {drop}",
            _BLANK_TARGET: f"have no text as their target, or only spaces. {drop}",
        }
        for flag, sentence in sentences.items():
            if flag in encoded.column_names:
                warn_of_rows(argument, encoded[flag][:], sentence)
        return encoded.remove_columns([flag for flag in sentences if flag in encoded.column_names])

    def evaluation_arguments(self, processor: Any, model: Any) -> dict[str, Any]:
        if missing := missing_metrics():
            commands = " and ".join(f"`{command}`" for command in dict.fromkeys(missing.values()))
            logger.info(f"Not computed: {', '.join(missing)}. {commands} installs what computes them.")
        return {
            "compute_metrics": TextMetrics(processor),
            "generation_kwargs": {"max_new_tokens": self._longest_target(model)},
        }

    def prediction_arguments(self, processor: Any, model: Any, max_new_tokens: int | None) -> dict[str, Any]:  # noqa: ARG002
        return generation_arguments(max_new_tokens or self._longest_target(model))

    def predicted_columns(self, predictions: Any, rows: Dataset, processor: Any, model: Any) -> dict[str, list[Any]]:  # noqa: ARG002
        return generated_columns(predictions, processor)

    def _longest_target(self, model: Any) -> int:
        """Return the most tokens of a target, its end token included.

        Raises:
            SettingsError: if the option exceeds the positions of the model.
        """
        positions, given = most_tokens(None, model.config, model), self.named.max_target_length
        if given is None:
            return min(_TARGET_LENGTH, positions or _TARGET_LENGTH)
        if positions is not None and given > positions:
            raise SettingsError(
                [f"`max_target_length` is {given}, but the model has only {positions} positions. Lower it."]
            )
        return given


@dataclass(frozen=True)
class _Targets:
    """A tokenizer that tokenizes targets, which some languages and models need."""

    tokenizer: Any

    @property
    def backend_tokenizer(self) -> Any:
        return getattr(self.tokenizer, "backend_tokenizer", None)

    def __call__(self, texts: list[str], **given: Any) -> Mapping[str, list]:
        return self.tokenizer(text_target=texts, **given)


@dataclass(frozen=True)
class _Encoder:
    """Turns sources into the encoder's inputs and targets into labels. Flags those that are cut or blank."""

    tokenizer: Any
    prefix: str
    limit: int | None
    longest_target: int

    def __call__(self, batch: Mapping[str, list[str]], positions: Sequence[int]) -> dict[str, list[Any]]:  # noqa: ARG002
        sources = TextEncoder(self.tokenizer, self.limit, None)
        encoded = sources([[f"{self.prefix}{source}" for source in batch["source"]]])
        encoded[_BLANK_SOURCE] = [not source.strip() for source in batch["source"]]
        if "target" in batch:
            targets = TextEncoder(_Targets(self.tokenizer), self.longest_target, None)([batch["target"]])
            encoded |= {"labels": targets["input_ids"], _CUT_TARGET: targets[CUT]}
            encoded[_BLANK_TARGET] = [not target.strip() for target in batch["target"]]
        return encoded


def _check_texts(rows: Dataset, argument: str) -> None:
    """Raise DataError naming the first row whose source or target is no text."""
    for role in (role for role in Seq2Seq.roles if role in rows.column_names):
        for n, value in enumerate(rows[role]):
            if isinstance(value, str):
                continue
            remedy = "Fix or drop the row."
            if isinstance(value, Mapping):
                remedy = f"Make a column of each of its texts, and name them: {naming('source', 'NAME,target=NAME')}."
            raise DataError(f"In `{argument}`, row {n} has {show(value)} instead of a text as its {role}. {remedy}")


def _warn_without_end(tokenizer: Any) -> None:
    """Warn if targets do not end in an end token."""
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None or end not in tokenizer(text_target="a")["input_ids"]:
        warn_user(
            "The tokenizer adds no end token to targets, so the model does not learn to stop. Give it an `eos_token` "
            "and a post-processor that adds it.",
            TextWarning,
        )
