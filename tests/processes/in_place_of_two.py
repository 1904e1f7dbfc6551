"""Accumulate windows on two processes, and print a JSON line of the largest relative error of their gradients.

Gradients of all linear layers are added in place. One layer is used only in the first two passes of one process.
"""

import json
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from ftaccum.accumulation.accumulator import GradientAccumulator
from ftaccum.data.loader import MicroBatch
from ftaccum.runtime.accelerator import accelerator_session, launched_processes
from ftaccum.runtime.gradients import in_place
from ftaccum.runtime.gradients.plain import GradientStrategy
from ftaccum.settings.runtime import Runtime

torch.set_num_threads(1)
in_place._LEAST_BYTES = 0
results: list[Any] = []
own = in_place._added


def added(*arguments: Any) -> Tensor | None:
    results.append(own(*arguments))
    return results[-1]


setattr(in_place, "_added", added)  # noqa: B010


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.rare = nn.Linear(3, 5), nn.Linear(5, 1), nn.Linear(5, 1)
        self.double()

    def forward(self, x: Tensor, is_rare: bool) -> Tensor:
        hidden = self.body(x).tanh()
        outputs: Tensor = self.head(hidden)
        return outputs + self.rare(hidden) if is_rare else outputs


class SquaredError:
    terms, window, modules = ("loss",), None, ()

    def attributes_before_lazy_passes(self) -> None:
        """Return None: no layer is lazy."""

    def means(self, model: nn.Module, batch: Any, *_: Any) -> tuple[dict[str, Tensor], None]:
        return {"loss": model(*batch).square().mean()}, None


def batch(rank: int, n: int) -> tuple[Tensor, bool]:
    draw = torch.Generator().manual_seed(10 * rank + n)
    return torch.randn(2 + n, 3, generator=draw, dtype=torch.float64), rank == 0 and n < 2


def relative_errors(model: nn.Module) -> list[float]:
    plain = Net()
    batches = [batch(rank, n) for rank in range(2) for n in range(4)]
    losses = [plain(*each).square().sum() for each in batches]
    (torch.stack(losses).sum() / sum(len(x) for x, _ in batches)).backward()
    errors = []
    for p, reference in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None
        assert reference.grad is not None
        errors.append(((p.grad - reference.grad).norm() / reference.grad.norm()).item())
    return errors


with launched_processes() as group, accelerator_session(Runtime(), 0, None) as accelerator:
    assert accelerator.num_processes == 2, "torchrun was to start two"
    model, errors = Net(), list[float]()
    strategy = GradientStrategy(torch.optim.SGD(model.parameters(), lr=0.1))
    wrapped, _ = strategy.prepare(accelerator, model)
    objective: Any = SquaredError()
    accumulator = GradientAccumulator(accelerator, wrapped, objective, strategy, group)
    for _ in range(2):
        mine = [batch(accelerator.process_index, n) for n in range(4)]
        accumulator.accumulate([MicroBatch.of(each, {"loss": len(each[0])}) for each in mine])
        errors += relative_errors(model)
        accumulator.zero_gradients()
    found = gather_object([(max(errors), sum(result is None for result in results))])
    if accelerator.is_main_process:
        print("FOUND", json.dumps(found))
PartialState().destroy_process_group()
