"""Accumulate the gradient of bfloat16 weights on two processes.

Print a JSON line {model: {how: the error against one batch in float64}}.
"""

import copy
import json
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from exactness import accumulated_gradients
from heads import HEADS, all_in_float64, one_batch_gradient, relative_error

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)
WAYS: dict[str, dict[str, Any]] = {
    "whole, in bfloat16": {},
    "whole, in float32": {"accumulate_in_fp32": True},
    "sharded, each": {"sharding": "fsdp2"},
    "sharded, last": {"sharding": "fsdp2", "sync": "last"},
}

found = {}
for name in ("causal LM, Llama", "seq2seq, T5"):
    rows, model = HEADS[name].rows(32), HEADS[name].model().bfloat16()
    with all_in_float64():
        wanted = one_batch_gradient(copy.deepcopy(model).double(), rows)
    found[name] = {}
    for way, arguments in WAYS.items():
        (gradient,) = accumulated_gradients(
            copy.deepcopy(model), rows, batch_size=1, gradient_accumulation_steps=16, planner=False, audit=False,
            on_inexact="ignore", **arguments,
        )  # fmt: skip
        wide = {weight: value.double() for weight, value in gradient.items()}
        found[name][way] = max(gather_object([relative_error(wide, wanted)]))
if state.is_main_process:
    print("ERRORS", json.dumps(found))
state.destroy_process_group()
