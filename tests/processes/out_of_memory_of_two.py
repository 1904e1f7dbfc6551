"""Train on two processes, the second of which runs out of memory. Print a JSON line of the results.

With the argument `synced`, it runs out in the backward pass that syncs gradients.
"""

import json
import sys
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState

from ftaccum.objective.batch_changes import fresh_batch
from invariance import difference, trained
from running_out import limited
from structures import with_a_narrow_weight

NAME = "sequence classification, BERT"

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)


def on_the_second(most: int, where: str = "forward") -> dict[str, object]:
    return {"prepare": lambda model: limited(model, most if state.process_index else 99, where)}


if sys.argv[1] == "synced":
    trained(NAME, 6, planner=False, **on_the_second(3, "backward"))

alone = torch.load(sys.argv[1], weights_only=False)
scarce = trained(NAME, 3, planner=False, **on_the_second(2))
auto = trained(NAME, "auto", **on_the_second(2))
# The only pass of a window runs out: its backward pass would sync gradients.
last = trained(NAME, 6, planner=False, **on_the_second(3))
loads: list[int] = []


def load(*args: Any) -> Any:
    """Fail before the forward pass in which DDP would sync buffers."""
    loads.append(1)
    if state.process_index and len(loads) == 1:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return fresh_batch(*args)


with patch("ftaccum.accumulation.accumulator.fresh_batch", load):
    before = trained(NAME, 3, planner=False, audit=False)
# The same with gradients summed in float32: then no backward pass syncs them.
most = 3 if state.process_index else 99
apart = trained(
    NAME, 6, planner=False, accumulate_in_fp32=True, prepare=lambda m: limited(with_a_narrow_weight(m), most)
)
del apart[0]["narrow"]
single = 0
try:
    trained(NAME, 3, **on_the_second(0))
except torch.OutOfMemoryError as error:
    single = int("a single row" in str(error))
counted = torch.tensor(single)
torch.distributed.all_reduce(counted)
if state.is_main_process:
    found = {
        "out_of_memory": scarce[1].out_of_memory,
        "difference": difference(alone, scarce),
        "last": last[1].out_of_memory,
        "last_difference": difference(alone, last),
        "before the pass": difference(alone, before),
        "apart": apart[1].out_of_memory,
        "apart_difference": difference(alone, apart),
        "auto": auto[1].batch_size,
        "auto_difference": difference(alone, auto),
        "single row": int(counted),
    }
    print("FOUND", json.dumps(found))
state.destroy_process_group()
