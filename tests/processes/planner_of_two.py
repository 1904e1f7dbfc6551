"""Cut windows on two processes in every way. Print a JSON line {head, way: largest difference from one process}."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed import Reducer
from torch.nn.parallel import DistributedDataParallel

from invariance import difference, trained

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)

passes: list[str] = []
forward, reduce_after = DistributedDataParallel.forward, Reducer.prepare_for_backward


def counted_forward(model: DistributedDataParallel, *args: Any, **kwargs: Any) -> Any:
    passes.append("forward")
    return forward(model, *args, **kwargs)


def counted_reduction(reducer: Reducer, *args: Any) -> Any:
    passes.append("reduction")
    return reduce_after(reducer, *args)


DistributedDataParallel.forward, Reducer.prepare_for_backward = counted_forward, counted_reduction
alone = torch.load(sys.argv[1], weights_only=False)
found, unsynced = {}, 0
for name, (short, long) in alone.items():
    for way, arguments in json.loads(Path(sys.argv[2]).read_text()).items():
        if way != "padding-free" or name.startswith("causal"):
            passes.clear()
            run = trained(name, 4, audit=False, **arguments)
            # The first pass and reduction are those of the model that uses up a warning of torch.
            assert passes.count("reduction") - 1 == len(run[1].loss_history), "gradients are reduced once an update"
            unsynced += passes.count("forward") - passes.count("reduction")
            found[f"{name}, {way}"] = difference(long if "n_epochs" in arguments else short, run)
assert unsynced > 0
if state.is_main_process:
    print("DIFFERENCES", json.dumps(found))
state.destroy_process_group()
