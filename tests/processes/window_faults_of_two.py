"""Let things go wrong in losses over the window on two processes. Print a JSON line of what each process said.

The argument is a folder. The second process runs out of memory, has a row that cannot be trained on, or draws random
numbers of its own. Runs are interrupted and resumed.
"""

import itertools
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from embedding_losses import Embedder, Hook, InfoNCE, info_nce, inputs_of, trained
from ftaccum import DataError, SettingsError
from ftaccum.checkpoint.manager import CheckpointManager
from heads import relative_error
from training_passes import in_self_check

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)
folder = Path(sys.argv[1])


def said(function: Callable[[], object], kind: type[BaseException] = Exception) -> list[str]:
    """Return what each process raises."""
    try:
        function()
    except kind as error:
        return gather_object([f"{type(error).__name__}: {error}"])
    return gather_object(["nothing"])


def runs_out(*, second: bool) -> Hook:
    """Return a hook that raises in passes of more than one row, in the first or the second passes of windows."""

    def hook(_: nn.Module, n_rows: int) -> None:
        if torch.is_grad_enabled() == second and n_rows > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return hook


class FailsOnce(InfoNCE):
    """A loss that raises an error in one window, on the second process or on both."""

    def __init__(self, error: Exception, *, everywhere: bool) -> None:
        super().__init__()
        self._error, self._everywhere, self.calls = error, everywhere, 0

    def forward(self, inputs: Any, batch: Any) -> Tensor:
        if not in_self_check():
            self.calls += 1
            if self.calls == 3 and (self._everywhere or state.process_index):
                raise self._error
        return super().forward(inputs, batch)


def late_fault(*, second: bool) -> Callable[..., Any]:
    """Return inputs of which one pass of the second process cannot be trained on."""
    calls = itertools.count()

    def inputs(outputs: Any, batch: Any) -> Any:
        if not in_self_check() and torch.is_grad_enabled() == second and state.process_index and next(calls) == 3:
            raise DataError("no text in row 3")
        return inputs_of(outputs, batch)

    return inputs


def drifting() -> Callable[..., Any]:
    """Return inputs that differ between the passes of a later window, on the second process."""
    calls = itertools.count()

    def inputs(outputs: Any, batch: Any) -> Any:
        found = inputs_of(outputs, batch)
        drifts = not in_self_check() and torch.is_grad_enabled() and state.process_index and next(calls) >= 4
        return {name: value * 1.001 for name, value in found.items()} if drifts else found

    return inputs


def kept(name: str) -> list[str]:
    state.wait_for_everyone()
    return sorted(path.name for path in (folder / name / "checkpoints").glob("*"))


found: dict[str, Any] = {}
for name, arguments in {
    "DDP": {}, "planned": {"planner": True}, "sharded": {"sharding": "fsdp2"},
    "sharded, synced at the end": {"sharding": "fsdp2", "sync": "last"},
}.items():  # fmt: skip
    options: dict[str, Any] = {"planner": False} | arguments
    whole = trained(**options)
    for second in (False, True):
        again = trained(runs_out(second=second), **options)
        found[f"out of memory, {name}, {'second' if second else 'first'} pass"] = [
            again["result"].out_of_memory,
            relative_error(again["weights"], whole["weights"]),
        ]
whole = trained()
sharded = trained(sharding="fsdp2")
found["sharded as whole"] = relative_error(sharded["weights"], whole["weights"])
found["scales"] = gather_object([float(whole["weights"]["loss_fn.log_scale"])])
for name, arguments in {"DDP": {}, "sharded": {"sharding": "fsdp2"}}.items():
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    for what, loss in {
        "loss out of memory": FailsOnce(memory, everywhere=False),
        "loss of the user": FailsOnce(ZeroDivisionError("a mistake"), everywhere=True),
        "loss with a fault": FailsOnce(DataError("no label"), everywhere=True),
    }.items():
        where = f"{name} {what}"
        found[where] = said(partial(trained, loss=loss.double(), output_dir=str(folder / where), **arguments))
        found[where] += kept(where)
    for second in (False, True):
        where = f"{name} inputs {second}"
        found[where] = said(
            partial(trained, inputs=late_fault(second=second), output_dir=str(folder / where), **arguments)
        )
        found[where] += kept(where)
    where = f"{name} drift"
    found[where] = said(partial(trained, inputs=drifting(), output_dir=str(folder / where), **arguments))
    found[where] += [*kept(where), *sorted(path.name for path in (folder / where / "model").glob("*.safetensors"))]


def resumed(where: str, **arguments: Any) -> None:
    """Record how runs that continue from each checkpoint differ from the whole one, in weights and in any bit."""
    common = {"n_epochs": 3, "checkpoint_every": 1, "keep_checkpoints": 100, **arguments}
    whole = trained(output_dir=str(folder / where), **common)
    for update in (2, 5):
        path = folder / where / "checkpoints" / f"update-{update:08}"
        again = trained(resume=str(path), **common)
        same = all(torch.equal(value, again["weights"][name]) for name, value in whole["weights"].items())
        found[f"resumed, {where}, {update}"] = gather_object(
            [[same, again["result"].loss_history == whole["result"].loss_history]]
        )
    if state.is_main_process:
        torch.save(whole["weights"], folder / f"{where}.pt")


def read(model: Any) -> Callable[..., Any]:
    return lambda inputs, batch: info_nce(inputs, batch, model.log_scale)


with patch.object(CheckpointManager, "finish", lambda *_, **__: None):  # keep all checkpoints
    resumed("dropping", dropout=0.5)
    resumed("plain")
    resumed("shards", sharding="fsdp2")
for name, arguments in {"DDP": {}, "sharded": {"sharding": "fsdp2"}}.items():
    audits = trained(**arguments | {"audit": 2})["result"].audits
    found[f"audits, {name}"] = [len(audits), max(audit["error"] for audit in audits), audits[0]["reference"]]
model = Embedder().double()
found["refused"] = said(partial(trained, model=model, loss=read(model), sharding="fsdp2"), SettingsError)
if state.is_main_process:
    print("FOUND", json.dumps(found))
state.destroy_process_group()
