"""Data sets that draw random numbers, raise, or kill the process that reads them."""

import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, get_worker_info

from ftaccum import Result, test_fine_tuning

# With this many rows, row 17 is not in the sample that is read before training, and it is in the eighth window of the
# first epoch. The last window of an epoch is short.
N_ROWS, WINDOW, BEFORE_17 = 67, 6, 7


def pair(index: int) -> tuple[Tensor, Tensor]:
    """Return four inputs and two targets in float64."""
    draw = torch.Generator().manual_seed(index)
    return torch.randn(4, generator=draw, dtype=torch.float64), torch.randn(2, generator=draw, dtype=torch.float64)


class Pairs(Dataset[Any]):
    """Numbered pairs without noise."""

    def __len__(self) -> int:
        return N_ROWS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return pair(index)


class Noisy(Pairs):
    """Pairs with noise from the global generators of Python, NumPy and torch."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = pair(index)
        return x + random.gauss(0, 1) + np.random.randn() + torch.randn(4, dtype=torch.float64), y


class SeldomNoisy(Noisy):
    """Pairs with that noise in row 17 alone, which is not in the sample."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return super().__getitem__(index) if index == 17 else pair(index)


class NoisyByItself(Pairs):
    """Pairs with noise from a generator of their own."""

    def __init__(self) -> None:
        self.draw = np.random.default_rng()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = pair(index)
        return x + self.draw.normal(), y


class Raising(Pairs):
    """Pairs of which a process of this rank cannot read row 17."""

    def __init__(self, rank: str = "0") -> None:
        self.rank = rank

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 17 and os.environ.get("RANK", "0") == self.rank:
            raise OSError("disk on fire")
        return pair(index)


class Deadly(Noisy):
    """Noisy pairs whose row 17 kills the worker that reads it, once for each file of a folder."""

    def __init__(self, folder: Path, lives: int) -> None:
        self.lives = [folder / f"life {n}" for n in range(lives)]
        for life in self.lives:
            life.touch()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        left = [life for life in self.lives if life.exists()]
        if index == 17 and left and get_worker_info() is not None:
            left[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def trained(rows: Any, **arguments: Any) -> tuple[dict[str, Tensor], Result]:
    """Return the weights and the result of two epochs on pairs."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    sizes = {"n_epochs": 2, "batch_size": 2, "effective_batch_size": WINDOW}
    others = {"loss_fn": nn.MSELoss(), "validation_split": 0.0, "learning_rate": 1e-2, "progress": False}
    result = test_fine_tuning(model, train_data=rows, **sizes | others | arguments)
    return model.state_dict(), result


def updates_in(folder: Path) -> int:
    """Return how many updates a run's ledger has."""
    return sum('"window"' in line for line in (folder / "ledger.jsonl").read_text().splitlines())


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())
