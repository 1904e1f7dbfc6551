"""Run `ftaccum train` without `--output_dir` on two processes, and save the model of a result on both.

The arguments are the working folder, the model and the rows.
"""

import os
import sys
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

import ftaccum.apps.output_folder
import ftaccum.tracking.model_files
from ftaccum.apps.cli import main
from interrupted import fine_tuned

folder, model, rows = sys.argv[1:]
os.chdir(folder)
state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"

saves: list[Any] = []
atomic_directory = ftaccum.tracking.model_files.atomic_directory
ftaccum.tracking.model_files.atomic_directory = lambda path: [saves.append(path), atomic_directory(path)][1]
fine_tuned(max_updates=1, audit=False).result.save_model("saved")
written = gather_object([len(saves)])
assert written == [1, 0], written

if not state.is_main_process:  # another machine may disagree on the date
    ftaccum.apps.output_folder.default_name = lambda *_: "other"
words = ["--model", model, "--train_data", rows, "--n_epochs", "1", "--no_progress", "--resume", "auto"]
assert main(["train", *words]) == 0
