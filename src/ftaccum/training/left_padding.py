"""Whether a model generates the same after a prompt with padding on its left."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from .prompts import left_padded

_WIDTH = 8
# Differences of logits relative to their spread: above what rounding changes, below what wrong positions change.
_TOLERANCE, _TOLERANCE_OF_16_BITS = 1e-3, 5e-2

Generate = Callable[[Mapping[str, Any], GenerationConfig], Any]


def ignores_left_padding(generate: Generate, prompt: Tensor, config: GenerationConfig, *, in_16_bits: bool) -> bool:
    """Return whether padding on the left leaves the logits after a prompt unchanged, except for rounding.

    Some models count positions from the start of the padding, or do not use the attention mask.

    Args:
        generate: returns what `model.generate` does for inputs and a config.
        config: the config to generate with. The model has positions for the prompt and all new tokens.
        in_16_bits: whether the model computes in bf16 or fp16.
    """
    n_padded = min(_WIDTH, config.max_new_tokens or 1)
    one_token = copy.deepcopy(config)
    one_token.update(
        max_new_tokens=1, min_new_tokens=None, num_beams=1, return_dict_in_generate=True, output_logits=True
    )
    alone = generate(left_padded([prompt]), one_token).logits[0][0]
    batch = left_padded([prompt, prompt[:1].expand(len(prompt) + n_padded)])
    padded = generate(batch, one_token).logits[0][0]
    spread = (alone - alone.mean()).norm()
    return bool((alone - padded).norm() <= (_TOLERANCE_OF_16_BITS if in_16_bits else _TOLERANCE) * spread)
