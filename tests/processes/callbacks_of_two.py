"""Train with callbacks that act on one of two processes. Print a JSON line of what each process ends with."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback

from ftaccum import CallbackError
from interrupted import checkpoints_of, fine_tuned

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)
folder = Path(sys.argv[1])


class OnProcessOne(TrainerCallback):
    """Sets a flag, or raises, after the third update, on the second process only."""

    def __init__(self, flag: str) -> None:
        self._flag = flag

    def on_step_end(self, args: Any, run: Any, control: Any, **_: Any) -> None:
        if run.global_step == 3 and args.process_index == 1:
            if self._flag == "raise":
                raise KeyError("lost")
            setattr(control, self._flag, True)


def outcome_of(flag: str) -> list[Any]:
    """Return the number of updates, or the error, of each process."""
    try:
        run = fine_tuned(
            callbacks=[OnProcessOne(flag)], output_dir=str(folder / flag), n_epochs=1, keep_checkpoints=9, audit=False
        )
    except CallbackError as error:
        return gather_object([str(error)])
    return gather_object([[run.result.optimizer_steps, run.result.evaluation_updates]])


found = {flag: outcome_of(flag) for flag in ("should_training_stop", "should_evaluate", "should_save", "raise")}
if state.is_main_process:
    checkpoints = {flag: checkpoints_of(folder / flag) for flag in ("should_save", "raise")}
    print("FOUND", json.dumps({"outcomes": found, "checkpoints": checkpoints}))
state.destroy_process_group()
