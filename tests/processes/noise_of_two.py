"""Measure the noise scale on two processes. Print a JSON line with the largest differences from a single process."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ftaccum.tracking.ledger_file import LedgerFile
from invariance import difference, trained
from running_out import limited
from test_noise_measurements import CLASSES, MEASURED

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)

alone, known = torch.load(sys.argv[1], weights_only=False)
found: dict[str, Any] = {}


def compare(name: str, way: str, size: int, most: int = 99) -> None:
    folder = Path(sys.argv[2]) / way
    # Memory runs out on the second process alone.
    limit = most if state.process_index == 1 else 99
    run = trained(name, size, lambda model: limited(model, limit), output_dir=str(folder), **MEASURED)
    assert run[1].num_processes == 2
    assert (run[1].out_of_memory > 0) == (most < 99)
    entries = LedgerFile.read(folder / "ledger.jsonl").ledger.noise_scales
    off = [
        max(abs(entry.agreement / same.agreement - 1), abs(entry.power / same.power - 1), entry.tokens != same.tokens)
        for entry, same in zip(entries, known[name], strict=True)
    ]
    found[f"{name}, {way.rsplit(' ', 1)[-1]}" if most == 99 else f"{name}, {way}"] = {
        "off": difference(alone[name], run),
        "measured": max(off),
    }


for name in alone:
    for size in (1, 4):
        compare(name, f"{name} {size}", size)
compare(CLASSES, "out of memory", 8, most=3)
if state.is_main_process:
    print("FOUND", json.dumps(found))
state.destroy_process_group()
