"""Texts that a language model generates for rows of prompts."""

from typing import Any

from transformers import EvalPrediction

from .text_metrics import decoded

_LENGTH = 256  # tokens of a generated text


def generation_arguments(max_new_tokens: int | None) -> dict[str, Any]:
    """Return the arguments of `test_fine_tuning` that make a run generate."""
    return {"generation_kwargs": {"max_new_tokens": max_new_tokens or _LENGTH}, "compute_metrics": no_metrics}


def no_metrics(evaluated: EvalPrediction) -> dict[str, float]:  # noqa: ARG001
    """Return no metrics. A run that generates must have a function that takes the texts."""
    return {}


def generated_columns(predictions: Any, tokenizer: Any) -> dict[str, list[Any]]:
    """Return the texts that were generated, in a column."""
    return {"prediction": decoded(predictions, tokenizer)}
