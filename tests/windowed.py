"""Rows of tokens, a model that embeds them, losses over a window, and their values in plain PyTorch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from ftaccum import Result, test_fine_tuning

GROUP = 4  # rows of an update, and of a group of validation rows
Row = dict[str, Any]


def rows_of(n: int, seed: int) -> list[Row]:
    """Return rows of unequal lengths, each with a target."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (n,), generator=draw).tolist()
    tokens = [torch.randint(1, 20, (length,), generator=draw).tolist() for length in lengths]
    targets = torch.randn(n, generator=draw).tolist()  # the values of float32
    return [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": y}
        for ids, y in zip(tokens, targets, strict=True)
    ]


ROWS, VAL_ROWS = rows_of(10, seed=1), rows_of(11, seed=2)


class Embedder(nn.Module):
    """The mean of the embeddings of a row's tokens. In eval mode, memory may run out if a batch is too large."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 3, dtype=torch.float64)
        self.dropout = nn.Dropout(dropout)
        self.most: int | None = None  # the largest number of rows once training has begun
        self.has_trained = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.has_trained |= self.training and torch.is_grad_enabled() and len(input_ids) > 1
        if self.most is not None and self.has_trained and not self.training and len(input_ids) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        mask = attention_mask.unsqueeze(-1)
        return (self.dropout(self.embedding(input_ids)) * mask).sum(1) / mask.sum(1)


def ordered(embeddings_BD: Tensor, batch: Any) -> Tensor:
    """Return a loss that compares all rows with each other, and reads their positions and their targets."""
    scores_BB = (embeddings_BD @ embeddings_BD.T).log_softmax(-1)
    neighbours_BB = torch.eye(len(scores_BB)).roll(1, 1).to(scores_BB)
    return -(scores_BB * neighbours_BB).sum() * batch["labels"].double().var(correction=0)


def drawing(embeddings_BD: Tensor, _: Any) -> Tensor:
    """Return a loss that draws random numbers."""
    return (embeddings_BD @ embeddings_BD.T * torch.rand(len(embeddings_BD), dtype=torch.float64)).mean()


class Breaking(Dataset[Any]):
    """The validation rows, of which row 9 cannot be read from the second evaluation on."""

    def __init__(self) -> None:
        self.reads = 0  # of row 9
        self.most = 10**9  # reads of row 9 that work

    def __len__(self) -> int:
        return len(VAL_ROWS)

    def __getitem__(self, index: int) -> Row:
        self.reads += index == 9
        if index == 9 and self.reads > self.most:
            raise ValueError("broken")
        return VAL_ROWS[index]


class BreaksRow9(TrainerCallback):
    """Lets the next read of row 9 fail."""

    def __init__(self, rows: Breaking) -> None:
        self.rows = rows

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.rows.most = self.rows.reads


def reference(loss: Any = ordered, *, rows: Sequence[Row] = VAL_ROWS, group: int = GROUP) -> float:
    """Return the mean of the losses of groups of rows, weighted by their rows, for the initial weights."""
    model, total = Embedder(), 0.0
    for start in range(0, len(rows), group):
        part = rows[start : start + group]
        ids = [torch.tensor([row["input_ids"]]) for row in part]
        embedded = torch.cat([model(one, torch.ones_like(one)) for one in ids])
        targets = torch.tensor([row["labels"] for row in part], dtype=torch.float64)
        total += loss(embedded, {"labels": targets}).item() * len(part)
    return total / len(rows)


def trained(model: nn.Module | None = None, **arguments: Any) -> Result:
    """Run one epoch of updates of 4 rows. `initial_loss` is the validation loss of the initial weights."""
    defaults = {
        "train_data": ROWS, "val_data": VAL_ROWS, "loss_fn": ordered, "loss_over": "window", "batch_size": 2,
        "effective_batch_size": GROUP, "n_epochs": 1, "progress": False, "lr_scheduler": "constant", "audit": False,
    }  # fmt: skip
    return test_fine_tuning(model or Embedder(), **(defaults | arguments))
