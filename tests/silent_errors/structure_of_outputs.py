"""Models that return their loss among other outputs."""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import case, update_error

N_ROWS = 7


@dataclass
class Outputs:
    prediction: Tensor
    loss: Tensor


Named = namedtuple("Named", ["prediction", "loss"])


class Regressor(nn.Module):
    def __init__(self, outputs: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer, self.outputs = nn.Linear(4, 3), nn.Linear(3, 1), outputs
        self.double()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        prediction = self.outer(self.inner(x).tanh())
        if labels is None:
            return prediction
        return self.outputs(prediction, (prediction.squeeze(-1) - labels).square().mean())


def error_of(outputs: Callable[[Tensor, Tensor], Any], loss_at: Callable[[Any], Tensor], **arguments: Any) -> float:
    draw = torch.Generator().manual_seed(2)
    rows = [{"x": torch.randn(4, generator=draw).double(), "labels": float(n)} for n in range(N_ROWS)]
    batch = {
        "x": torch.stack([row["x"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]).double(),
    }
    return update_error(Regressor(outputs), rows, lambda model: loss_at(model(**batch)), N_ROWS, **arguments)


@case(11, "`(prediction, loss)` with one output", refused=None)
def prediction_before_loss() -> float:
    return error_of(lambda prediction, loss: (prediction, loss), lambda outputs: outputs[1])


@case(11, "the same, one row at a time", refused=None)
def prediction_before_loss_one_row_at_a_time() -> float:
    return error_of(lambda prediction, loss: (prediction, loss), lambda outputs: outputs[1], batch_size=1)


@case(11, "`(squeezed prediction, loss)`", refused=None)
def squeezed_prediction() -> float:
    return error_of(lambda prediction, loss: (prediction.squeeze(), loss), lambda outputs: outputs[1])


@case(11, "`(squared error so far, loss)`: two numbers, one of them without a gradient", refused=None)
def metric_before_loss() -> float:
    return error_of(lambda p, loss: (p.detach().abs().mean(), p, loss), lambda outputs: outputs[2])


@case(11, "`(penalty, loss)`, the loss computed from the penalty", refused=None)
def part_before_loss() -> float:
    def outputs(prediction: Tensor, loss: Tensor) -> Any:
        penalty = prediction.square().mean()
        return penalty, loss + 0.1 * penalty

    return error_of(outputs, lambda outputs: outputs[1])


@case(11, "`(penalty, loss)`, two numbers that do not depend on each other", refused="which of them is the loss")
def two_numbers() -> float:
    return error_of(lambda p, loss: (p.square().mean(), loss), lambda outputs: outputs[1])


@case(11, "a loss that is a tensor", refused=None)
def bare_loss() -> float:
    return error_of(lambda _, loss: loss, lambda outputs: outputs)


@case(11, "a dataclass", refused=None)
def dataclass_outputs() -> float:
    return error_of(Outputs, lambda outputs: outputs.loss)


@case(11, "a named tuple", refused=None)
def named_tuple() -> float:
    return error_of(Named, lambda outputs: outputs.loss)


@case(11, "one loss a row, one row at a time", refused="one number")
def one_loss_a_row() -> float:
    def loss_fn(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(outputs.squeeze(-1), batch["labels"], reduction="none")

    return error_of(lambda p, loss: (p, loss), lambda outputs: outputs[1], batch_size=1, loss_fn=loss_fn)
