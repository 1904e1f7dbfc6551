"""Run passes that fail on one of two processes. Print a JSON line of the errors of both and of the checkpoints."""

import itertools
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from ftaccum import DataError, test_fine_tuning
from heads import HEADS, relative_error
from interrupted import checkpoints_of, ledger_of
from training_passes import is_training_pass

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)
folder = Path(sys.argv[1])

# Windows have four passes per process. These are the second and the last pass of the sixth window.
LOCAL, LAST = 22, 24
draw = torch.Generator().manual_seed(1)
ROWS = [(torch.randn(8, generator=draw), n % 3) for n in range(128)]


def late_term(outputs: Tensor, labels: Tensor) -> Any:
    return {"a": F.cross_entropy(outputs, labels), "b": outputs.pow(2).mean()}


def constant(outputs: Tensor, labels: Tensor) -> Any:
    return {"a": F.cross_entropy(outputs, labels).detach()}


def changed_in_place(outputs: Tensor, labels: Tensor) -> Any:
    labels[0] = -100
    return {"a": F.cross_entropy(outputs, labels)}


class Net(nn.Module):
    """A classifier with running statistics and dropout that counts its training passes.

    Args:
        apart: Whether to add a bfloat16 weight that adds 0, so that `accumulate_in_fp32` sums all gradients.
    """

    def __init__(self, *, apart: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))
        self.narrow = nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) if apart else None
        self.n_passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.n_passes += self.training and is_training_pass()
        outputs = self.layers(x)
        return outputs if self.narrow is None else outputs + 0 * self.narrow.sum()


def trained(fault: Callable[..., Any] | None, at: int, *, apart: bool, **arguments: Any) -> dict[str, Tensor]:
    """Train with a loss that fails in one pass of the second process."""
    model = Net(apart=apart)

    def loss(outputs: Tensor, labels: Tensor) -> Any:
        if fault and state.process_index and model.n_passes == at and is_training_pass():
            return fault(outputs, labels)
        return {"a": F.cross_entropy(outputs, labels)}

    test_fine_tuning(
        model, train_data=ROWS, loss_fn=loss, batch_size=2, effective_batch_size=16, n_epochs=1, validation_split=0.0,
        planner=False, audit=False, accumulate_in_fp32=apart, progress=False, **arguments,
    )  # fmt: skip
    return model.state_dict()


def told(function: Callable[[], object]) -> list[str]:
    """Return the DataError that each process raised."""
    try:
        function()
    except DataError as error:
        return gather_object([str(error)])
    return gather_object(["nothing"])


found: dict[str, Any] = {}
for apart, faults in ((False, (late_term, constant, changed_in_place)), (True, (constant,))):
    whole = trained(None, 0, apart=apart)
    for fault, at in itertools.product(faults, (LOCAL, LAST)):
        name = f"{fault.__name__} {'apart ' if apart else ''}{'local' if at == LOCAL else 'last'}"
        output_dir = str(folder / name)
        errors = told(partial(trained, fault, at, apart=apart, output_dir=output_dir))
        kept = checkpoints_of(folder / name)
        n_updates = len(ledger_of(folder / name).splitlines())
        resumed = trained(None, 0, apart=apart, output_dir=output_dir, resume="auto")
        found[name] = [errors, kept, n_updates, relative_error(resumed, whole)]


def constant_when_sharded() -> None:
    """Train a sharded model whose loss is a constant in the third pass of the second process."""
    head = HEADS["causal LM, Llama"]
    model, passes = head.model(), 0

    def detach(module: nn.Module, _: Any, outputs: Any) -> None:
        nonlocal passes
        passes += module.training and is_training_pass()
        if state.process_index and passes == 3 and is_training_pass():
            outputs.loss = outputs.loss.detach()

    model.register_forward_hook(detach)
    test_fine_tuning(
        model, train_data=head.rows(), batch_size=1, gradient_accumulation_steps=2, n_epochs=1, audit=False,
        validation_split=0.0, planner=False, progress=False, sharding="fsdp2",
    )  # fmt: skip


found["sharded"] = told(constant_when_sharded)
if state.is_main_process:
    print("FOUND", json.dumps(found))
state.destroy_process_group()
