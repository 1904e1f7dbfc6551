"""Every structure on two processes: prints a JSON line {structure, how gradients are summed: largest relative error}.

One process alone has the row that takes the other branch.
"""

import json

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

from exactness import window_errors
from heads import all_in_float64
from structures import STRUCTURES, with_a_narrow_weight

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)
SIZES = {"num_processes": 2, "batch_size": 1, "gradient_accumulation_steps": 3}

found = {}
with all_in_float64():
    for name, structure in STRUCTURES.items():
        for wide in (False, True):
            model = with_a_narrow_weight(structure.model()) if wide else structure.model()
            rare: list[int] = []
            if name == "conditional branches":
                model.rare.register_full_backward_hook(lambda *_, rare=rare: rare.append(1))
            errors = window_errors(model, structure.rows(), accumulate_in_fp32=wide, **SIZES, **structure.arguments)
            found[f"{name}, {'apart' if wide else 'by DDP'}"] = max(gather_object(errors))
            if name == "conditional branches":
                # Once to have the gradient to compare with, and once in training, on one of the two.
                assert sorted(gather_object([len(rare)])) == [1, 2]

    # Weights that differ are made those of the first process.
    structure = STRUCTURES["frozen weights"]
    model = with_a_narrow_weight(structure.model())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + state.process_index)
    errors = window_errors(model, structure.rows(), accumulate_in_fp32=True, **SIZES)
    found["weights of the first process"] = max(gather_object([errors])[0])
    parameters = nn.utils.parameters_to_vector(p.double() for p in model.parameters())
    found["weights alike"] = float((parameters - torch.stack(gather_object([parameters])).mean(0)).abs().max())
if state.is_main_process:
    print("ERRORS", json.dumps(found))
state.destroy_process_group()
