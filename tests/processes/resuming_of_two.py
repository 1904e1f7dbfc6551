"""Interrupt and resume runs on two processes. Print a JSON line of the differences from undisturbed runs.

The argument is a folder with `one/`, a finished single-process run. This script adds `two/`, a run of two processes.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ftaccum import Preempted
from interrupted import checkpoints_of, elastic, fine_tuned, ledger_of, model
from training_passes import is_training_pass

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)
folder = Path(sys.argv[1])
found: dict[str, Any] = {}


def on_both(what: list[str]) -> list[str]:
    return [name for names in gather_object([what]) for name in names]


whole = fine_tuned(output_dir=str(folder / "whole"), checkpoint_every=3, keep_checkpoints=100)
names = checkpoints_of(folder / "whole")
for name in names:
    again = fine_tuned(output_dir=str(folder / "again"), resume=str(folder / "whole" / "checkpoints" / name))
    found[name] = on_both(whole.differences(again))
    found[name] += ["ledger"] if ledger_of(folder / "again") != ledger_of(folder / "whole") else []

trained = model()


def ask_one_process(module: Any, *_: Any) -> None:
    if is_training_pass() and module.training and module.n_seen == 7 and state.process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)


trained.register_forward_hook(ask_one_process)
try:
    fine_tuned(trained, output_dir=str(folder / "asked"))
except Preempted as ended:
    found["heard"] = gather_object([[ended.code, str(ended).split(",")[0]]])
again = fine_tuned(output_dir=str(folder / "asked"), resume="auto")
found["asked"] = on_both(whole.differences(again))

# Resume the checkpoint of a single process on two. The test resumes theirs on a single process.
_, gone_on = elastic(resume=str(folder / "one" / "checkpoints" / "update-00000006"))
elastic(output_dir=str(folder / "two"), checkpoint_every=3, keep_checkpoints=9)
if state.is_main_process:
    torch.save(gone_on, folder / "gone_on.pt")
    print("FOUND", json.dumps(found))
state.destroy_process_group()
