"""Train with sharded weights on two processes, the second of which runs out of memory. Print a JSON line of results.

With the argument `synced`, it runs out in a backward pass.
"""

import json
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

from ftaccum import Result, test_fine_tuning
from ftaccum.objective.batch_changes import fresh_batch
from heads import HEADS, all_in_float64
from running_out import limited
from sharded_runs import difference, whole_weights
from training_passes import is_training_pass

HEAD, BLOCK = HEADS["sequence classification, BERT"], "bert.encoder.layer.1"
VALIDATION = HEAD.rows(12, seed=1)

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)


def trained(prepare: Callable[[nn.Module], object] = lambda _: None, **arguments: Any) -> tuple[Any, Result]:
    """Train for three updates of six rows per process. `prepare` changes the model of the second process."""
    model = HEAD.model()
    if state.process_index:
        prepare(model)
    defaults = {
        "batch_size": 3, "effective_batch_size": 12, "n_epochs": 1, "validation_split": 0.0, "planner": False,
        "audit": False, "learning_rate": 1e-3, "gradient_clip_norm": 0.5, "progress": False, "verbosity": "quiet",
    }  # fmt: skip
    with all_in_float64():
        result = test_fine_tuning(model, train_data=HEAD.rows(36), **(defaults | arguments))
    return whole_weights(model), result


def refusing(part: str, most: int) -> Callable[[nn.Module], object]:
    """Return a function that lets one module of a model run out of memory in training passes with many rows."""

    def refuse(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args[0].shape[0] > most and is_training_pass():
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return lambda model: model.get_submodule(part).register_forward_pre_hook(refuse)


def refusing_once(model: nn.Module) -> None:
    """Let a model run out of memory in the second pass of a window, inside a block."""
    passes = [0]

    def refuse(*_: Any) -> None:
        passes[0] += is_training_pass()
        if is_training_pass() and passes[0] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.get_submodule(BLOCK).output.register_forward_pre_hook(refuse)


def sharded(prepare: Callable[[nn.Module], object], wanted: Any = None, **arguments: Any) -> dict[str, Any]:
    got = trained(prepare, sharding="fsdp2", **arguments)
    return {
        "times": got[1].out_of_memory,
        "difference": max(gather_object([difference(got, wanted or plenty)])),
        "batch_size": got[1].batch_size,
        "references": [audit["reference"] for audit in got[1].audits],
        "audits": max((audit["error"] for audit in got[1].audits), default=0.0),
    }


def refused_in_evaluation(_: nn.Module, args: tuple[Any, ...]) -> None:
    if not torch.is_grad_enabled() and args[0].shape[0] == len(VALIDATION) // 2:
        refused.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory.")


def load(*args: Any) -> Any:
    """Fail once before a forward pass, when the batch is moved to the device."""
    loads.append(1)
    if state.process_index and len(loads) == fails_at:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return fresh_batch(*args)


if sys.argv[1:] == ["synced"]:
    trained(lambda model: limited(model, 2, "backward"), sharding="fsdp2")

loads: list[int] = []
refused: list[int] = []
plenty = trained()
found: dict[str, Any] = {
    **{f"before the blocks, {sync}": sharded(lambda model: limited(model, 2), sync=sync) for sync in ("each", "last")},
    **{f"inside a block, {sync}": sharded(refusing(f"{BLOCK}.output", 2), sync=sync) for sync in ("each", "last")},
    **{f"in the second pass, {sync}": sharded(refusing_once, sync=sync) for sync in ("each", "last")},
    "after the blocks": sharded(refusing("classifier", 2)),
    "audited": sharded(lambda model: limited(model, 2), audit=True),
    "auto": sharded(lambda model: limited(model, 2), batch_size="auto"),
}
with patch("ftaccum.accumulation.accumulator.fresh_batch", load):
    fails_at = 2
    found["before the pass"] = sharded(lambda _: None)
    loads, fails_at = [], 1
    found["before the first pass"] = sharded(lambda _: None)
evaluated = {"val_data": VALIDATION, "eval_batch_size": 6}
found["in an evaluation"] = sharded(
    lambda model: model.get_submodule(BLOCK).output.register_forward_pre_hook(refused_in_evaluation),
    trained(**evaluated),
    **evaluated,
)
found["refused"] = gather_object([len(refused)])
try:
    trained(lambda model: limited(model, 0), sharding="fsdp2")
except torch.OutOfMemoryError as error:
    said = str(error)
else:
    said = "nothing"
found["a single row"] = gather_object([said])
if state.is_main_process:
    print("FOUND", json.dumps(found))
state.destroy_process_group()
