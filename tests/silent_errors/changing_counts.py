"""A count that changes during training, which no measurement before training can find."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftaccum import test_fine_tuning

from .case import case

N_ROWS, N_FEATURES = 12, 6


def _over_hard(outputs: Any, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(outputs, targets, reduction="none")
    hard = losses > 0.02
    return (losses * hard).sum() / hard.sum().clamp(min=1)


@case(10, "a mean over losses above 0.02, which shrink", refused="the loss does not weight these rows by")
def count_that_changes() -> float:
    torch.manual_seed(1)
    torch.manual_seed(0)
    inputs = torch.randn(N_ROWS, N_FEATURES, dtype=torch.float64)
    rows = [(x, (x[0] > 0).long()) for x in inputs]
    model, targets = nn.Linear(N_FEATURES, 2).double(), torch.stack([y for _, y in rows])
    reference, start = copy.deepcopy(model), copy.deepcopy(model)
    for _ in range(20):
        reference.zero_grad()
        _over_hard(reference(inputs), targets).backward()
        with torch.no_grad():
            for p in reference.parameters():
                p -= 2 * p.grad
    test_fine_tuning(
        model, train_data=rows, loss_fn=_over_hard, batch_size=2, effective_batch_size=N_ROWS, n_epochs=20,
        validation_split=0.0, optimizer=lambda groups: torch.optim.SGD(groups), learning_rate=2.0,
        lr_scheduler="constant", weight_decay=0.0, gradient_clip_norm=None, on_inexact="error", progress=False,
    )  # fmt: skip
    off = sum(
        float((a - b).detach().square().sum()) for a, b in zip(model.parameters(), reference.parameters(), strict=True)
    )
    moved = sum(
        float((a - b).detach().square().sum()) for a, b in zip(start.parameters(), reference.parameters(), strict=True)
    )
    return (off / moved) ** 0.5
