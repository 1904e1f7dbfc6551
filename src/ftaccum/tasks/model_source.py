"""Loads a model with the head of a task, and its tokenizer or image processor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from ..errors import SettingsError
from ..runtime.adapters import mark_as_new
from ..runtime.library_output import load_report_withheld
from ..runtime.log import logger
from ..runtime.sharding.launcher import hidden_modes
from .arguments import ModelArguments
from .model_names import check_name, fault_of_class
from .new_weights import NewWeights
from .quantization import quantization_config

_NAMED = 5  # weights to name in a message


@dataclass(frozen=True)
class ModelSource:
    """The source of a model and the options for loading it. It can be pickled.

    Attributes:
        arguments: the options of loading.
        model_class: the auto class with the task's head.
        processor_class: the auto class of the tokenizer or image processor.
        head: further arguments of `from_pretrained`, such as the names of the classes.
        dtype: the type of the weights; "auto" as in the checkpoint.
        load_in_4bit, load_in_8bit: whether linear layers have so few bits.
    """

    arguments: ModelArguments
    model_class: Any
    processor_class: Any
    head: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    load_in_4bit: bool = False
    load_in_8bit: bool = False

    def load(self) -> tuple[Any, Any]:
        """Return the model and its tokenizer or image processor.

        Raises:
            SettingsError: if one of them cannot be loaded.
        """
        processor = self.load_processor()
        return self.load_model(processor), processor

    def load_processor(self) -> Any:
        """Return the tokenizer or image processor, with the added tokens.

        Raises:
            SettingsError: if it cannot be loaded.
        """
        named = self.arguments
        name = named.tokenizer or named.model
        check_name("model", named.model, named.revision)
        if named.tokenizer:
            check_name("tokenizer", named.tokenizer, asks_hub=False)
        try:
            processor = self.processor_class.from_pretrained(name, **self._hub(name == named.model))
        except Exception as error:  # libraries and code of the hub may raise anything
            raise _cannot_load("tokenizer" if named.tokenizer else "model", name, error) from error
        if named.add_tokens and hasattr(processor, "add_tokens"):
            processor.add_tokens(list(named.add_tokens))
        # Models made for generation often have no padding token. Padding is masked anyway.
        if getattr(processor, "pad_token", "none") is None:
            processor.pad_token = processor.eos_token
        return processor

    def load_model(self, processor: Any) -> Any:
        """Return the model, in which the weights that `freeze` names are frozen. Log which weights are new.

        Args:
            processor: the tokenizer or image processor. The model gets its padding token and, if it has tokens that the
                model lacks, further embeddings.

        Raises:
            SettingsError: if the model cannot be loaded.
        """
        named, more = self.arguments, dict(self.head)
        if named.attn_implementation is not None:
            more["attn_implementation"] = named.attn_implementation
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        compute_dtype = None if dtype == "auto" else dtype
        bits = {"load_in_4bit": self.load_in_4bit, "load_in_8bit": self.load_in_8bit}
        if (quantization := quantization_config(**bits, dtype=compute_dtype)) is not None:
            more["quantization_config"] = quantization
        try:
            with load_report_withheld(), hidden_modes():
                model, report = self.model_class.from_pretrained(
                    named.model, dtype=dtype, output_loading_info=True, **self._hub(True), **more
                )
        except Exception as error:  # libraries and code of the hub may raise anything
            fault = fault_of_class("model", named.model, self.model_class, getattr(named, "task", None))
            raise SettingsError([fault]) if fault else _cannot_load("model", named.model, error) from error
        if new := NewWeights.of(model, report):
            logger.log(new.level, new)
        self._fit_to(processor, model)
        freeze(model, named.freeze)
        return model

    def _hub(self, is_model: bool) -> dict[str, Any]:
        """Return the arguments for files of the hub. A revision is one of the model's repository."""
        found: dict[str, Any] = {"trust_remote_code": True} if self.arguments.trust_remote_code else {}
        return found | ({"revision": self.arguments.revision} if is_model and self.arguments.revision else {})

    def _fit_to(self, processor: Any, model: Any) -> None:
        if getattr(processor, "pad_token_id", None) is not None:  # classifiers use the last token that is not padding
            model.config.pad_token_id = processor.pad_token_id
        if not self.arguments.add_tokens:
            return
        n_rows = model.get_input_embeddings().weight.shape[0]
        if len(processor) > n_rows:
            model.resize_token_embeddings(len(processor))
            logger.info(f"Added {len(processor) - n_rows} rows to the embeddings, for the tokens of `add_tokens`.")
        for layer in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
            mark_as_new(layer)  # with `lora`, modules with new weights are trained


def freeze(model: Any, patterns: Sequence[str]) -> None:
    """Freeze the weights whose names match a pattern, such as `*.embeddings` or `bert.encoder.layer.[0-3]`.

    Args:
        patterns: shell patterns. One that matches the name of a module freezes all its weights.

    Raises:
        SettingsError: if a pattern matches no weight, or all weights are frozen.
    """
    names = dict(model.named_parameters())
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if not matched:
            shown = ", ".join(list(names)[:_NAMED])
            raise SettingsError(
                [f"`freeze` has the pattern {pattern!r}, which matches no weight. The first weights are {shown}."]
            )
        for name in matched:
            names[name].requires_grad_(False)
    if patterns and not any(p.requires_grad for p in names.values()):
        raise SettingsError(["`freeze` matches all weights, so nothing would be trained. Leave some patterns out."])


def _cannot_load(option: str, name: str, error: Exception) -> SettingsError:
    if isinstance(error, ImportError):  # its message says what to install, in several lines
        return SettingsError([f"`{option}` {name!r} cannot be loaded: {' '.join(str(error).split())}"])
    return SettingsError(
        [f"`{option}` {name!r} cannot be loaded: {error} Give a folder that `save_pretrained` wrote, or a hub model."]
    )
