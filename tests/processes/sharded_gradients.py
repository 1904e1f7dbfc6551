"""Train the heads and structures that are named with sharded weights, on two or more processes.

Print a JSON line {name, passes that sync: largest relative gradient error on any process}, and one with the number of
units of each.
"""

import json
import sys

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed.fsdp import FSDPModule

from exactness import window_errors
from heads import HEADS, all_in_float64
from skipping import Hooked, Looping, Skipping, Unused
from structures import STRUCTURES, Structure

state = PartialState(cpu=True)
assert state.num_processes > 1, "torchrun was to start several"
torch.set_num_threads(1)

_ROWS = HEADS["sequence classification, BERT"].rows
OTHERS = {
    "skipped blocks": Structure(lambda: Skipping().double(), _ROWS),
    "skipped blocks with hooks": Structure(lambda: Hooked().double(), _ROWS),
    "an unused block": Structure(lambda: Unused().double(), _ROWS),
    "blocks that run twice": Structure(lambda: Looping().double(), _ROWS),
}
EVERY = {name: Structure(head.model, head.rows) for name, head in HEADS.items()} | STRUCTURES | OTHERS

errors, units = {}, {}
with all_in_float64():
    for name in EVERY if sys.argv[1:] == ["all"] else sys.argv[1:]:
        structure = EVERY[name]
        for sync in ("each", "last"):
            model = structure.model()
            # Windows of three rows per process, and a remainder in which processes have different numbers of rows.
            found = window_errors(
                model, structure.rows(), num_processes=state.num_processes, batch_size=1,
                gradient_accumulation_steps=3, sharding="fsdp2", sync=sync, audit=False, **structure.arguments,
            )  # fmt: skip
            errors[f"{name}, {sync}"] = max(gather_object(found))
            units[name] = sum(isinstance(module, FSDPModule) for module in model.modules())
if state.is_main_process:
    print("ERRORS", json.dumps(errors))
    print("UNITS", json.dumps(units))
state.destroy_process_group()
