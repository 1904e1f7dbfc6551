"""Train with users' optimizers on two processes. Print a JSON line of the errors against one batch."""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

sys.path.insert(0, str(Path(__file__).parents[1]))  # before `scripts`, which has a module of this name
from silent_errors import closures, modes, rates, sparse, trained_parameters
from silent_errors.case import CASES, Case

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)

MODULES = {module.__name__ for module in (closures, modes, rates, sparse, trained_parameters)}
WITH_A_FOLDER = ("`model/` and",)  # which would have to be the same on both


def runs_here(case: Case) -> bool:
    """Return whether to run a case. Others are registered too if tests have imported their modules."""
    return case.run.__module__ in MODULES and case.refused is None and not case.name.startswith(WITH_A_FOLDER)


errors = {case.name: case.run() for case in CASES if runs_here(case)}
(first, second) = gather_object([errors])
assert first == second, "all processes come to the same"
if state.is_main_process:
    print(json.dumps(errors))
