"""What a model of Transformers declares about itself. Another module declares nothing."""

from typing import Any

from torch import nn


def output_embeddings(model: Any) -> nn.Module | None:
    """Return the layer that computes the logits of a language model; None for another model."""
    try:
        layer = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return layer if isinstance(layer, nn.Module) else None


def can_generate(model: Any) -> bool:
    """Return whether a model generates texts."""
    return bool(getattr(model, "can_generate", lambda: False)())


def is_encoder_decoder(model: Any) -> bool:
    """Return whether a model has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def stores_attention_matrices(model: Any) -> bool:
    """Return whether attention keeps its matrix of tokens × tokens, which fused kernels compute in pieces."""
    return getattr(model.config, "_attn_implementation", None) in (None, "eager")
