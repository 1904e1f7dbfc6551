"""The recipes of `invariance` on two processes: prints a JSON line {head: largest difference from one process}.

The single-process runs come from the file that the test wrote: this process group has no way to be one process.
"""

import json
import sys

import torch
from accelerate import PartialState

from invariance import NAMES, difference, trained

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)

alone = torch.load(sys.argv[1], weights_only=False)
found = {}
for name in NAMES:
    for batch_size in (1, 4, 6):
        run = trained(name, batch_size)
        assert run[1].num_processes == 2
        found[f"{name}, {batch_size}"] = difference(alone[name], run)
if state.is_main_process:
    print("DIFFERENCES", json.dumps(found))
state.destroy_process_group()
