"""A fast search: a layer with a little noise in its gradient classifies points in the plane."""

from typing import Any

import torch
from optuna import Study
from torch import nn

from ftaccum import search

N_ROWS = 72  # 8 of them are held out


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, points_BD: torch.Tensor) -> torch.Tensor:
        return self.layer(points_BD)


def points(n: int = N_ROWS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return rows of two classes, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    x_BD = torch.randn(n, 2, generator=generator)
    labels_B = (x_BD.sum(1) + 0.3 * torch.randn(n, generator=generator) > 0).long()
    return list(zip(x_BD, labels_B, strict=True))


def quick(**arguments: Any) -> Study:
    """Run a search on the points, of 4 trials by default."""
    return search(
        **{
            "model_factory": Layer,
            "train_data": points(),
            "loss_fn": nn.CrossEntropyLoss(),
            "batch_size": 2,
            "validation_split": 1 / 9,
            "n_epochs": 2,
            "learning_rate": (1e-4, 1e-1),
            "n_trials": 4,
            "progress": False,
        }
        | arguments
    )
