"""Buffers that change in the forward passes of skipped updates."""

import math

import torch
from torch import Tensor, nn

from ftaccum import test_fine_tuning

from .case import WITHOUT_AUDITS, case

SIZE = 5000  # too large to be copied for every window


class Averaged(nn.Module):
    """A layer with a running average of its inputs from the fourth forward pass on. In one pass its output is NaN."""

    average: Tensor

    def __init__(self, faulty_pass: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(SIZE, 1, dtype=torch.float64)
        self.register_buffer("average", torch.zeros(SIZE, dtype=torch.float64))
        self.faulty_pass, self.seen = faulty_pass, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.seen.append(x[0])
            x = x * math.nan if len(self.seen) == self.faulty_pass else x
            if len(self.seen) > 3:
                self.average.data.lerp_(x[0], 0.5)  # does not change the version counter of the buffer
        return self.layer(x)


def average_error(faulty_pass: int) -> float:
    """Return the error of the average against that over the updates taken, of one forward pass each."""
    draw = torch.Generator().manual_seed(0)
    targets = torch.zeros(6, 1, dtype=torch.float64)
    rows = list(zip(torch.randn(6, SIZE, generator=draw, dtype=torch.float64), targets, strict=True))
    model = Averaged(faulty_pass)
    test_fine_tuning(
        model, train_data=rows, loss_fn=nn.MSELoss(), n_epochs=1, batch_size=1, effective_batch_size=1,
        validation_split=0.0, progress=False, on_inexact="ignore", **WITHOUT_AUDITS,
    )  # fmt: skip
    wanted = torch.zeros(SIZE, dtype=torch.float64)
    for number, x in enumerate(model.seen, start=1):
        if number > 3 and number != faulty_pass:
            wanted.lerp_(x, 0.5)
    return float((model.average - wanted).norm() / wanted.norm())


@case(17, "a large buffer first moves in an update that is skipped")
def buffer_that_first_moves_in_a_skipped_update() -> float:
    return average_error(faulty_pass=4)


@case(17, "a large buffer that began to move later, in an update that is skipped")
def buffer_that_moved_before_a_skipped_update() -> float:
    return average_error(faulty_pass=6)
