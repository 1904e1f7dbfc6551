"""Train with users' optimizers on two processes. Print a JSON line of the errors against one batch."""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

sys.path.insert(0, str(Path(__file__).parents[1]))  # before `scripts`, which has a module of this name
from silent_errors import closures, modes, rates, sparse  # noqa: F401
from silent_errors.case import CASES

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)

WITH_A_FOLDER = ("`model/` and",)  # which would have to be the same on both
errors = {case.name: case.run() for case in CASES if case.refused is None and not case.name.startswith(WITH_A_FOLDER)}
(first, second) = gather_object([errors])
assert first == second, "all processes come to the same"
if state.is_main_process:
    print(json.dumps(errors))
