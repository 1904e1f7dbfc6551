"""Train on two processes. Print a JSON line with the ledger's entries and the positions that each process embedded."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object

from ftaccum.training import loop
from test_window_entries import trained

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)

loop.peak_memory = lambda _: 10**12 + 7 * state.process_index  # type: ignore[assignment]
reduce, reductions = Accelerator.reduce, []


def counted(accelerator: Accelerator, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    reductions.append(list(tensor.shape))
    return reduce(accelerator, tensor, *args, **kwargs)


Accelerator.reduce = counted
windows, observer = trained(Path(sys.argv[1]), planner=False, n_rows=16, effective_batch_size=8)
positions = gather_object([observer.positions])
norms = gather_object([observer.clipped_norms])
if state.is_main_process:
    found = {"windows": [vars(w) for w in windows], "positions": positions, "norms": norms, "reductions": reductions}
    print("FOUND", json.dumps(found))
state.destroy_process_group()
