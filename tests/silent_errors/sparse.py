"""Embedding tables with sparse gradients, and complex weights."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer, SparseAdam

from optimizers import Chain

from .case import case
from .rates import distance, train, train_plainly

Rows = list[tuple[Tensor, Tensor]]


class Bag(nn.Module):
    """A table with sparse gradients, whose rows are averaged, and a linear head."""

    def __init__(self, table: Callable[..., nn.Module], trains_head: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = table(20, 3, sparse=True).double(), nn.Linear(3, 2).double()
        self.head.requires_grad_(trains_head)

    def forward(self, ids: Tensor) -> Tensor:
        found = self.table(ids)
        return self.head(found if found.ndim == 2 else found.mean(1))


def rows_of_ids() -> Rows:
    torch.manual_seed(1)
    return [(torch.randint(20, (4,)), torch.randn(2, dtype=torch.float64)) for _ in range(8)]


def sparse_error(
    factory: Any, table: Callable[..., nn.Module] = nn.EmbeddingBag, trains_head: bool = True, **arguments: Any
) -> float:
    """Return the error of a run against plain PyTorch with one batch and sparse gradients."""
    model, rows = Bag(table, trains_head), rows_of_ids()
    start, reference = copy.deepcopy(model), copy.deepcopy(model)
    groups = [{"params": [p]} for p in reference.parameters() if p.requires_grad]
    with torch.sparse.check_sparse_tensor_invariants(False):  # avoids the warnings of tensors that Adagrad makes
        train_plainly(reference, rows, factory(groups))
    train(model, rows, factory, **{"weight_decay": 0.0} | arguments)
    return distance(model, reference, start)


def of_both(groups: Any) -> Optimizer:
    """Return SparseAdam for the table and AdamW for the rest."""
    params = [p for group in groups for p in group["params"]]
    table, rest = [p for p in params if len(p) == 20], [p for p in params if len(p) < 20]
    return Chain(SparseAdam(table, lr=0.1), AdamW(rest, lr=0.1, weight_decay=0.0))


@case(23, "`EmbeddingBag(sparse=True)` under SGD")
def bag_and_sgd() -> float:
    return sparse_error(partial(SGD, lr=0.1, momentum=0.9))


@case(23, "`EmbeddingBag(sparse=True)` under Adagrad")
def bag_and_adagrad() -> float:
    return sparse_error(partial(Adagrad, lr=0.1))


@case(23, "`EmbeddingBag(sparse=True)` under SparseAdam")
def bag_and_sparse_adam() -> float:
    return sparse_error(partial(SparseAdam, lr=0.1), trains_head=False)


@case(23, "`Embedding(sparse=True)` under SGD", slow=True)
def embedding_and_sgd() -> float:
    return sparse_error(partial(SGD, lr=0.1, momentum=0.9), nn.Embedding)


@case(23, "`Embedding(sparse=True)` under SparseAdam")
def embedding_and_sparse_adam() -> float:
    return sparse_error(partial(SparseAdam, lr=0.1), nn.Embedding, trains_head=False)


@case(23, "`Embedding(sparse=True)` under a chain of SparseAdam and AdamW")
def chain() -> float:
    return sparse_error(of_both, nn.Embedding)


@case(24, "complex weights under AdamW, clipped")
def complex_weights() -> float:
    torch.manual_seed(0)
    model, rows = Rotating(), rows_of_ids()
    numbers = [(torch.randn(4, dtype=torch.complex128), target) for _, target in rows]
    start, reference = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = AdamW(reference.parameters(), lr=0.1, weight_decay=0.0)
    inputs, targets = (torch.stack(column) for column in zip(*numbers, strict=True))
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(reference(inputs), targets).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        optimizer.step()
    train(model, numbers, None, learning_rate=0.1, weight_decay=0.0, gradient_clip_norm=0.1)
    return distance(model, reference, start)


class Rotating(nn.Module):
    """A complex matrix that returns the absolute values of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, dtype=torch.complex128))

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs @ self.weight).abs()
