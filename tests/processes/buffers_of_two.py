"""Sync buffers on two processes. Print a JSON line of their values, in training and in evaluation."""

import json
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from ftaccum.accumulation.buffers import MovingBuffers
from ftaccum.runtime.process_group import open_process_group
from ftaccum.training.callbacks import Callback
from ftaccum.training.config import RunConfig
from ftaccum.training.run import run_training

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)
rank = state.process_index
TYPES = (
    torch.bool,
    torch.bfloat16,
    torch.float16,
    torch.int16,
    torch.int64,
    torch.float64,
    torch.complex64,
    torch.uint8,
)


def of_every_kind() -> list[bool]:
    """Return whether each buffer of this process equals the main process's after a sync."""
    model, shared = nn.Module(), torch.full((3,), float(rank))
    for n, dtype in enumerate(TYPES):
        model.register_buffer(f"typed_{n}", torch.full((3,), rank).to(dtype), persistent=bool(n % 2))
    model.register_buffer("number", torch.tensor(rank))
    model.register_buffer("transposed", torch.full((3, 2), float(rank)).T)
    model.register_buffer("expanded", torch.full((1, 1), float(rank)).expand(4, 3))
    model.register_buffer("large", torch.full((5000,), float(rank)))
    model.register_buffer("unset", None)
    model.other = nn.Module()
    model.register_buffer("shared", shared)
    model.other.register_buffer("shared", shared)
    model.register_buffer("of_its_own_length", torch.full((rank + 2,), float(rank)))
    with open_process_group(2) as group:
        buffers = MovingBuffers(model, group)
        buffers.sync()
        found = [not buffer.any() for name, buffer in model.named_buffers() if name != "of_its_own_length"]
        found.append(model.other.shared is model.shared)
        found.append(bool((model.of_its_own_length == rank).all()))
        model.register_buffer("lazy", torch.full((3,), float(rank)))
        model.shared = torch.full((3,), float(rank))
        buffers.sync()
        found += [not model.lazy.any(), not model.shared.any()]
        if rank:
            model.register_buffer("on_one_process", torch.ones(3))
        buffers.sync()
        found.append(not rank or bool(model.on_one_process.all()))
    return [bool(each) for each in found]


class Averaged(nn.Module):
    """A model with a running average that starts in the fourth pass and differs between processes."""

    average: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 1, dtype=torch.float64)
        self.register_buffer("average", torch.zeros(size, dtype=torch.float64))
        self.passes, self.evaluated = 0, list[float]()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.evaluated.append(float(self.average[0]))
        elif torch.is_grad_enabled():
            self.passes += 1
            if self.passes > 3:
                self.average.data.lerp_(x[0, 0].expand(len(self.average)), 0.5)
        return self.layer(x) + 0 * self.average[0]


class Asking(Callback):
    """A callback that evaluates the model in the middle of an epoch."""

    def evaluation_rows(self, plan: Any) -> list[int]:  # noqa: ARG002
        return [10, 14]


def trained(size: int) -> Averaged:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(24, 2, generator=draw, dtype=torch.float64)
    rows = [(each, each[:1]) for each in x]
    model = Averaged(size)
    arguments = dict.fromkeys(
        ("config", "tokenizer", "data_collator", "count_items", "optimizer", "compute_metrics", "loss_fn")
    )
    given = {"train_data": rows[:20], "val_data": rows[20:], "loss_fn": nn.MSELoss(), "reduction": "mean"}
    sizes = {"batch_size": 1, "effective_batch_size": 2, "n_epochs": 1, "progress": False, "on_inexact": "ignore"}
    run_training(RunConfig.from_arguments({**arguments, "model": model, **given, **sizes}), Asking())
    return model


found = {"kinds": gather_object([of_every_kind()]), "evaluated": {}, "trained": {}}
for size in (1, 5000):
    model = trained(size)
    found["evaluated"][size] = gather_object([sorted(set(model.evaluated))])
    found["trained"][size] = gather_object([model.average.unique().tolist()])
if state.is_main_process:
    print("FOUND", json.dumps(found))
state.destroy_process_group()
