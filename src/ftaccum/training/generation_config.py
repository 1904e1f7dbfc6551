"""The generation config of an evaluation: greedy unless the user asks for more, and the same for every batch."""

import copy
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn
from transformers import GenerationConfig

from ..data.tokenize import most_tokens
from ..errors import SettingsError, shown
from ..runtime.model_traits import can_generate, is_encoder_decoder

_NAME = "`generation_kwargs`"
_GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
_ONE_SEQUENCE = {
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}
# Settings for sampling or beams that a model's own config may have, and their values without effect.
_OF_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "typical_p": 1.0, "min_p": None, "top_h": None}
_OF_SAMPLING |= {"epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
_OF_BEAMS = {"early_stopping": False, "length_penalty": 1.0}
_LENGTHS = ("max_new_tokens", "max_length")
_WITH_PROMPT = {"max_length": "max_new_tokens", "min_length": "min_new_tokens"}


def faults_of_generation(options: Any, model: Any, *, has_function: bool, preprocesses: bool) -> list[str]:
    """Return a sentence for each reason why an evaluation cannot generate.

    Args:
        options: the argument `generation_kwargs`, not None.
        has_function: whether `compute_metrics` is a function, which can get token ids.
        preprocesses: whether there is a `preprocess_logits_for_metrics`.
    """
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        return [
            f"{_NAME} must be a dict of arguments of `model.generate`, or None, but is {shown(options)} instead. For "
            "example, give {'max_new_tokens': 64}."
        ]
    faults = []
    if not has_function:
        faults.append(
            f"{_NAME} is given, but `compute_metrics` is no function, so nothing uses the generated token ids. Give a "
            "function of an EvalPrediction, or leave it out."
        )
    if preprocesses:
        faults.append(
            f"{_NAME} is given, so the predictions are token ids, but `preprocess_logits_for_metrics` changes logits. "
            "Leave one of them out."
        )
    if isinstance(model, nn.Module):
        try:
            generation_config(model, options)
        except SettingsError as error:
            faults += error.faults
    return faults


def generation_config(model: Any, options: Mapping[str, Any], pad_token_id: int | None = None) -> GenerationConfig:
    """Return the config to generate with: that of the model with greedy decoding, changed by the options.

    Args:
        pad_token_id: the padding token, if the model's config names none.

    Raises:
        SettingsError: if the model cannot generate, or an option is unknown, invalid, or depends on the batch.
    """
    if not can_generate(model):
        raise SettingsError(
            [
                f"{_NAME} is given, but {type(model).__name__} cannot generate. Load a model with a language-modeling "
                "head, such as AutoModelForCausalLM or AutoModelForSeq2SeqLM, or leave it out."
            ]
        )
    config, is_decoder = copy.deepcopy(model.generation_config), not is_encoder_decoder(model)
    faults = _unknown(options, config) or _unusable(options, is_decoder=is_decoder)
    if faults:
        raise SettingsError(faults)
    named = {**_GREEDY, **_ONE_SEQUENCE, **options}
    named |= {} if named["do_sample"] else {name: each for name, each in _OF_SAMPLING.items() if name not in options}
    named |= {name: each for name, each in _OF_BEAMS.items() if named["num_beams"] == 1 and name not in options}
    named |= {"max_length": None, "min_length": None} if is_decoder else {}
    if "max_length" in options and "max_new_tokens" not in options:
        named["max_new_tokens"] = None
    elif options.get("max_new_tokens") is not None:
        named["max_length"] = None
    try:
        for name, value in named.items():
            setattr(config, name, value)
        config.validate(strict=True)
    except (TypeError, ValueError) as error:
        raise SettingsError([f"{_NAME} is not valid: {_one_line(error)} Fix it, or leave it out."]) from error
    _check_length(config, model)
    if config.pad_token_id is None or config.pad_token_id < 0:
        config.pad_token_id = next((n for n in (pad_token_id, *end_tokens(config)) if n is not None), 0)
    return config


def end_tokens(config: GenerationConfig) -> tuple[int, ...]:
    """Return the ids of the tokens that end a text."""
    ids = config.eos_token_id
    return () if ids is None else tuple(ids) if isinstance(ids, list | tuple) else (ids,)


def _unknown(options: Mapping[str, Any], config: GenerationConfig) -> list[str]:
    known = vars(config)
    faults = []
    for name in (name for name in options if name not in known or name.startswith("_")):
        close = get_close_matches(name, known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "Settings are, for example, max_new_tokens and num_beams."
        faults.append(f"{_NAME} has {name!r}, which is no setting of transformers.GenerationConfig. {hint}")
    return faults


def _unusable(options: Mapping[str, Any], *, is_decoder: bool) -> list[str]:
    """Return a sentence for each option that makes the output of a row something else than one text, or luck."""
    faults = []
    for name, value in options.items():
        if (name in _ONE_SEQUENCE and value) or (name == "num_return_sequences" and value not in (None, 1)):
            faults.append(f"{_NAME} sets {name!r} to {shown(value)}, but metrics need one text a row. Leave it out.")
        elif name == "max_time" and value is not None:
            faults.append(f"{_NAME} sets 'max_time', so texts would depend on the machine. Give 'max_new_tokens'.")
        elif name in _WITH_PROMPT and is_decoder and value is not None:
            faults.append(
                f"{_NAME} sets {name!r}, which counts the tokens of the prompt and its padding for a decoder-only "
                f"model. Give {_WITH_PROMPT[name]!r}, which counts generated tokens alone."
            )
    return faults


def _check_length(config: GenerationConfig, model: Any) -> None:
    """Raise SettingsError if nothing limits the length of a text, or if the decoder has fewer positions."""
    lengths = {name: getattr(config, name) for name in _LENGTHS if getattr(config, name) is not None}
    if not lengths:
        raise SettingsError(
            [
                f"{_NAME} must have 'max_new_tokens', because the model's generation config names no length either. "
                "For example, give {'max_new_tokens': 64}."
            ]
        )
    limit = most_tokens(None, model.config, model)
    (name, length), *_ = lengths.items()
    if limit is not None and length > limit:
        raise SettingsError([f"{_NAME} sets {name!r} to {length}, but the model has only {limit} positions. Lower it."])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") + "."
