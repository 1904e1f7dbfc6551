"""Streams that behave badly, and a recorder of the rows that a run trains on."""

import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import IterableDataset, get_worker_info

from ftaccum.data.prefetch import LocalWindow
from ftaccum.training.loop import TrainingLoop


class Stream(IterableDataset[Any]):
    """A stream that yields its rows in order, can be repeated, and counts the rows read."""

    def __init__(self, rows: Sequence[Any], *, fails_after: int | None = None, passes: int | None = None) -> None:
        self.rows, self.fails_after, self.passes = rows, fails_after, passes
        self.n_read, self.epochs = 0, list[int]()

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[Any]:
        if self.passes is not None:
            self.passes -= 1
        for row in self.rows if self.passes is None or self.passes >= 0 else ():
            if self.n_read == self.fails_after:
                raise OSError("the line is dead")
            self.n_read += 1
            yield row


class Contrary(IterableDataset[Any]):
    """Numbered points, split among processes by rank, in a different order on each process and in each pass."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = list(range(self.n))
        random.Random(os.urandom(8)).shuffle(order)
        rank, size = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
        assert (rank, size) == (int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        worker = get_worker_info()
        assert worker is None
        for number in order[rank::size]:
            yield point(number)


def point(number: int) -> tuple[Tensor, Tensor]:
    """Return a row of three numbers, the first of which identifies it, and its class."""
    return torch.tensor([float(number), (number * 7 % 11) / 11, (number * 5 % 13) / 13]), torch.tensor(number % 2)


class Plane(nn.Module):
    """A classifier of points that ignores their numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2).double()

    def forward(self, points_BD: Tensor) -> Tensor:
        return self.layer(points_BD[:, 1:].double())


class Seen:
    """A recorder of the points that this process trains on in each update, without dummies and audits."""

    def __init__(self) -> None:
        self.windows: list[list[int]] = []
        self._kept = TrainingLoop._update

    def __enter__(self) -> "Seen":
        kept, windows = self._kept, self.windows

        def update(loop: TrainingLoop, window: LocalWindow, *others: Any) -> Any:
            real = [micro.batch[0][:, 0] for micro in window.micro_batches if not micro.is_dummy]
            windows.append([int(number) for numbers in real for number in numbers])
            return kept(loop, window, *others)

        TrainingLoop._update = update  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        TrainingLoop._update = self._kept  # type: ignore[method-assign]
