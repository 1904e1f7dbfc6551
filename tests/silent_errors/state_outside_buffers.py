"""Models and losses that keep state for the next forward pass outside of parameters and buffers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import case, update_error

N_ROWS, CLASSES = 8, 3
DEPENDS = "which the next one depends on"


class Counting(nn.Module):
    def __init__(self, *, in_training: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.calls, self.in_training = nn.Linear(4, CLASSES), 0, in_training
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.training or not self.in_training:
            self.calls += 1
            return self.linear(x) * (1 + self.calls)
        return self.linear(x)


class Remembering(nn.Module):
    """A model that adds a running average of its earlier outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.average = nn.Linear(4, CLASSES), None
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.linear(x)
        new = outputs.detach().mean(0)
        self.average = new if self.average is None else 0.5 * self.average + 0.5 * new
        return outputs + self.average


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def error_of(model: nn.Module, loss: Any = loss_fn) -> float:
    draw = torch.Generator().manual_seed(3)
    rows = [(torch.randn(4, generator=draw).double(), torch.tensor(n % CLASSES)) for n in range(N_ROWS)]
    x, y = (torch.stack(column) for column in zip(*rows, strict=True))
    return update_error(model, rows, lambda model: loss_fn(model(x), y), N_ROWS, loss_fn=loss)


@case(12, "`self.calls += 1` in `forward` changes what it returns", refused=f"calls.*{DEPENDS}")
def counting() -> float:
    return error_of(Counting())


@case(12, "the same in train mode alone", refused=f"calls.*{DEPENDS}")
def counting_in_train_mode() -> float:
    return error_of(Counting(in_training=True))


@case(12, "an average that is a plain attribute", refused=f"average.*{DEPENDS}")
def remembering() -> float:
    return error_of(Remembering())


@case(12, "`loss_fn` counts its calls in a closure", refused="differ by")
def counting_loss() -> float:
    calls = 0

    def annealed(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return loss_fn(outputs, targets) * (1 + 1 / calls)

    return error_of(Net(), annealed)


@case(12, "a counter of calls that changes nothing", refused=None)
def harmless_counter() -> float:
    class Harmless(Counting):
        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.linear(x)

    return error_of(Harmless())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, CLASSES).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)
