"""Count the bytes that tensors hold, to compare them with estimates."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import LlamaConfig

# Some first dimensions are odd (the vocabulary, the feed-forward layer), so that two processes hold unequal shards.
TINY_LLAMA = LlamaConfig(
    vocab_size=127,
    hidden_size=32,
    intermediate_size=45,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)


def bytes_of_storages(tensors: Iterable[Any]) -> int:
    """Return the bytes of the different storages of tensors; of DTensors, those of their local parts."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if isinstance(t, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}
    return sum(storages.values())


def bytes_of_states(optimizer: Optimizer) -> int:
    """Return the bytes of the tensors in an optimizer's state."""
    return bytes_of_storages(value for state in optimizer.state.values() for value in state.values())


def bytes_kept_for_backward(model: Any, batch: dict[str, Tensor], *, autocast: bool = False) -> int:
    """Return the bytes that autograd keeps of a forward pass, without the model's own weights and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # a reference, so that no other tensor gets the same address
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        loss = model(**batch).loss
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())
