"""The attention of a model of Transformers."""

from typing import Any


def stores_attention_matrices(model: Any) -> bool:
    """Return whether attention keeps its matrix of tokens × tokens, which fused kernels compute in pieces."""
    return getattr(model.config, "_attn_implementation", None) in (None, "eager")
