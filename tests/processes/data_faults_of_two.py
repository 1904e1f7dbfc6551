"""Train on data that fail on one of two processes, or draw. Print a JSON line of each process's errors and results."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from failing_data import Deadly, Noisy, Pairs, Raising, trained, updates_in
from ftaccum import DataError
from heads import relative_error

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)
folder = Path(sys.argv[1])


def error_of(case: str, rows: Any, **arguments: Any) -> list[str]:
    """Return the error of each process."""
    try:
        trained(rows, output_dir=str(folder / case), **arguments)
    except DataError as error:
        return gather_object([str(error)])
    return gather_object(["nothing"])


if state.process_index == 1:
    (folder / "lives").mkdir()
state.wait_for_everyone()
# In micro-batches of three, the second process gets row 17 in the first epoch and in every evaluation.
deadly = Deadly(folder / "lives", 99 if state.process_index == 1 else 0)
errors = {
    "row": error_of("row", Raising("1"), batch_size=3),
    "row, with workers": error_of("row, with workers", Raising("1"), batch_size=3, num_workers=2),
    "validation row": error_of("validation row", Pairs(), val_data=Raising("1"), batch_size=3),
    "dying workers": error_of("dying workers", deadly, batch_size=3, num_workers=2),
}
weights, result = trained(Noisy(), val_data=Noisy(), batch_size=2)
if state.is_main_process:
    ledgers = {case: updates_in(folder / case) for case in errors if case != "validation row"}
    found = {
        "errors": errors,
        "ledgers": ledgers,
        "difference": relative_error(weights, torch.load(folder / "alone.pt")),
        "val losses": result.val_loss_history,
    }
    print("FOUND", json.dumps(found))
state.destroy_process_group()
