"""The limit on predictions in memory: no logits for every token of a language model, and no hidden states."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingsError
from ..objective.item_counts import tensors_of
from ..runtime.model_traits import output_embeddings
from ..runtime.model_wrapper import model_to_save
from .predictions import unwrapped, without_numbers

_HIDDEN = ("hidden_state", "attentions")


def check_prediction_memory(
    named: Mapping[str, Any], sizes: Collection[int], n_rows: int, *, predicts_next_token: bool
) -> None:
    """Raise SettingsError if the predictions for `compute_metrics` would grow with the vocabulary or hidden states.

    Args:
        named: the model's outputs for the longest validation row, by name.
        sizes: the sizes of the vocabularies that the model may predict tokens of.
        n_rows: number of validation rows.
        predicts_next_token: whether the logits at one position predict the label at the next.
    """
    kept = without_numbers(named)
    over_vocabulary = [
        name
        for name, value in kept.items()
        if isinstance(value, Tensor)
        and value.ndim >= 3
        and (value.shape[-1] in sizes or (predicts_next_token and name in ("logits", next(iter(kept)))))
    ]
    hidden = [name for name in kept if any(part in name for part in _HIDDEN)]
    if not over_vocabulary and not hidden:
        return
    n_bytes = n_rows * sum(_bytes(t) for name in {*over_vocabulary, *hidden} for t in tensors_of(kept[name]))
    if over_vocabulary:
        name = over_vocabulary[0]
        shape = " × ".join(str(n) for n in (n_rows, *kept[name].shape[1:]))
        would = f"`compute_metrics` would get {shape} logits (rows, length, vocabulary)"
        remedy, gets = f"{_access(named, name)}.argmax(-1)", "token ids"
    else:
        would = f"`compute_metrics` would get {', '.join(f'`{name}`' for name in hidden)} of all {n_rows} rows"
        name = next((name for name in kept if name not in hidden), hidden[0])
        remedy, gets = _access(named, name), f"only `{name}`"
    raise SettingsError(
        [
            f"{would}, which would take about {n_bytes:,} bytes. Give "
            f"`preprocess_logits_for_metrics=lambda logits, labels: {remedy}`: `compute_metrics` then gets {gets}."
        ]
    )


def vocabulary_sizes(model: nn.Module, config: Any) -> set[int]:
    """Return the sizes of the vocabularies that a model may predict tokens of, from its config and its head.

    Args:
        config: the model's configuration, or another object that may have a `vocab_size`.
    """
    nested = ("text_config", "decoder")  # of models of images and text, and of an encoder with a decoder
    configs = [config, *(getattr(config, name, None) for name in nested)]
    sizes = {getattr(each, "vocab_size", None) for each in configs}
    sizes.add(getattr(output_embeddings(model_to_save(model)), "out_features", None))
    return {size for size in sizes if isinstance(size, int)}


def _access(named: Mapping[str, Any], name: str) -> str:
    """Return the expression for one output in `preprocess_logits_for_metrics`."""
    return "logits" if not isinstance(unwrapped(named), tuple) else f"logits[{list(named).index(name)}]"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * (4 if tensor.dtype == torch.bfloat16 else tensor.element_size())
