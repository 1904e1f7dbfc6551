"""Train on two processes with trackers. The main process alone stores the run."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ftaccum.tracking import trackers
from test_tracker_stores import trained

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)
os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
os.environ.pop("MLFLOW_TRACKING_URI", None)

started: list[str] = []
start = trackers._started
trackers._started = lambda accelerator, asked: (started.append(str(asked)), start(accelerator, asked))[1]
trained(Path(sys.argv[1]), sys.argv[2].split(","))
of_each = gather_object([started])
if state.is_main_process:
    print("STARTED", json.dumps(of_each))
state.destroy_process_group()
