"""The check that a model which should predict the next token does not see it."""

from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)


def faults_of_reading_direction(model: Any) -> list[str]:
    """Return a sentence if each token of a model sees the next ones, which a causal LM should predict.

    Types of models that Transformers has both with masked and with causal prediction, such as BERT, are causal only if
    their config has `is_decoder`. Classes that are always causal, such as BartForCausalLM, set it.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    is_either = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if not is_either or getattr(config, "is_decoder", True):
        return []
    return [
        f"The model, of type {kind!r}, is an encoder: each token sees the next ones, so it would only learn to copy "
        "them. Train it with `--task masked-lm` (in Python: `AutoModelForMaskedLM` and "
        "`DataCollatorForLanguageModeling`), or choose a model that generates text. If it is a decoder, set "
        "`is_decoder` to true in its `config.json`."
    ]
