"""Let things go wrong on two processes with sharded weights. Print a JSON line of what each process said.

One process runs its blocks in another order, has a row whose loss is infinite, or an overflow of float16.
"""

import json
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, SGD, Adafactor, AdamW, Optimizer

from ftaccum import DataError, DivergedError, SettingsError, test_fine_tuning
from heads import HEADS, relative_error
from optimizers import muon_and_adamw
from sharded_cases import Poisoned, poisoned_rows
from sharded_runs import trained, whole_weights
from skipping import Turning
from test_nonfinite import _Overflows
from training_passes import is_training_pass

BERT, LLAMA = HEADS["sequence classification, BERT"], HEADS["causal LM, Llama"]

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)


def said(function: Callable[[], object], kind: type[Exception]) -> list[str]:
    """Return what each process raises."""
    try:
        function()
    except kind as error:
        return gather_object([str(error)])
    return gather_object(["nothing"])


def turned() -> dict[str, Any]:
    """Train a model that runs its blocks in reverse order in the fifth pass of the second process."""
    model, passes, kept = Turning().double(), [0], [whole_weights(Turning())]

    def turn(*_: Any) -> None:
        passes[0] += is_training_pass()
        model.turns = state.process_index == 1 and passes[0] == 5

    model.register_forward_pre_hook(turn)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    optimizer.register_step_post_hook(lambda *_: kept.append(whole_weights(model)))
    run = partial(
        test_fine_tuning, model, train_data=BERT.rows(24), optimizer=optimizer, batch_size=1, n_epochs=1, planner=False,
        gradient_accumulation_steps=2, validation_split=0.0, audit=False, progress=False, verbosity="quiet",
        sharding="fsdp2",
    )  # fmt: skip
    errors = said(run, DataError)
    return {
        "errors": errors,
        "updates": len(kept) - 1,
        "off": relative_error(whole_weights(model), kept[-1]),
        "moved": relative_error(kept[-1], kept[0]),
        "gradients": sum(p.grad is not None for p in model.parameters()),
    }


def poisoned() -> dict[str, Any]:
    """Train on a row whose loss is infinite, which only one process has."""
    weights, results = [], []
    for sharding in ("off", "fsdp2"):
        found = trained(Poisoned().double(), poisoned_rows(), sharding=sharding, val_data=poisoned_rows()[4:9])
        weights.append(found[0])
        results.append(found[1])
    run = partial(
        trained, Poisoned().double(), poisoned_rows(), sharding="fsdp2", val_data=poisoned_rows()[4:9],
        on_nonfinite="error",
    )  # fmt: skip
    finite = [[norm for norm in result.grad_norm_history if math.isfinite(norm)] for result in results]
    return {
        "skipped": gather_object([result.skipped_steps for result in results]),
        "difference": relative_error(weights[1], weights[0]),
        "norms": max(abs(a - b) for a, b in zip(*finite, strict=True)),
        "errors": said(run, DivergedError),
    }


def overflowed(sharding: str) -> Any:
    """Train in float16 with gradients that overflow in the first training pass of the second process."""
    model, passes = LLAMA.model().float(), [0]

    def overflow(_: nn.Module, __: Any, outputs: Any) -> None:
        passes[0] += is_training_pass()
        if is_training_pass() and passes[0] == 1 and state.process_index:
            outputs.loss = _Overflows.apply(outputs.loss)

    model.register_forward_hook(overflow)
    return trained(model, LLAMA.rows(), mixed_precision="fp16", audit=False, sharding=sharding)


class Trusting(Optimizer):
    """Steps by a ratio of norms, as numbers, like common versions of LAMB."""

    def __init__(self, groups: Iterable[Any]) -> None:
        super().__init__(groups, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.add_(p.grad, alpha=-group["lr"] * p.norm().item() / (p.grad.norm().item() + 1e-9))


class OfShards(Trusting):
    """Divides by the norm of what this process holds."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                weight, gradient = (t.to_local() if isinstance(t, DTensor) else t for t in (p, p.grad))
                weight.add_(gradient / (gradient.norm() + 1e-9), alpha=-group["lr"])


def refused(optimizer: Any) -> list[str]:
    return said(partial(trained, BERT.model(), BERT.rows(), optimizer=optimizer, sharding="fsdp2"), SettingsError)


found: dict[str, Any] = {"turned": turned(), "poisoned": poisoned()}
whole, sharded = overflowed("off"), overflowed("fsdp2")
found["overflow"] = {
    "skipped": gather_object([whole[1].skipped_steps, sharded[1].skipped_steps]),
    "difference": relative_error(sharded[0], whole[0]),
}
found["refused"] = {
    "Adafactor": refused(lambda groups: Adafactor(groups)),
    "LBFGS": refused(lambda groups: LBFGS([p for group in groups for p in group["params"]], lr=1e-3)),
    "Trusting": refused(Trusting),
    "OfShards": refused(OfShards),
    "Chain": refused(muon_and_adamw),
    "SGD": refused(lambda groups: SGD(groups, momentum=0.9, nesterov=True)),
}
if state.is_main_process:
    print("FOUND", json.dumps(found))
state.destroy_process_group()
