"""Train the cases that are named on two processes, with whole and with sharded weights.

Print a JSON line {name: how the two runs differ}.
"""

import json
import sys
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed.fsdp import FSDPModule

from heads import relative_error
from sharded_cases import CASES
from sharded_runs import Case, difference, whole_weights

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)


def compared(case: Case) -> dict[str, Any]:

    whole = case.trained(**case.alone)
    made = case.model()
    initial = whole_weights(made)
    sharded = case.trained(sharding="fsdp2")
    assert any(isinstance(module, FSDPModule) for module in sharded[1].model.modules())
    assert not any(isinstance(module, FSDPModule) for module in whole[1].model.modules())
    audits = sharded[1].audits
    return {
        "difference": max(gather_object([difference(sharded, whole)])),
        "moved": relative_error(whole[0], initial) if initial.keys() == whole[0].keys() else None,
        "audits": max((audit["error"] for audit in audits), default=0.0),
        "n_audits": len(audits),
        "references": sorted({audit["reference"] for audit in audits}),
        "batch_size": sharded[1].batch_size,
        "evaluations": sharded[1].evaluation_updates,
        "restored_update": sharded[1].restored_update,
        "best_update": sharded[1].best_update,
        "metrics": sharded[1].metrics,
        "skipped": gather_object([sharded[1].skipped_steps, whole[1].skipped_steps]),
        "tolerance": case.tolerance,
    }


found = {name: compared(CASES[name]) for name in sys.argv[1:]}
if state.is_main_process:
    print("FOUND", json.dumps(found))
state.destroy_process_group()
