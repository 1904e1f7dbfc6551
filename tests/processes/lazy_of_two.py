"""Train a classifier on two processes whose last layer fails with lazy tensors in some passes of the second process.

Prints a JSON line: the largest relative error of the windows' gradients, and why windows were repeated.
"""

import json
import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from exactness import window_errors
from ftaccum.objective.last_layer import LastLayer
from heads import HEADS, all_in_float64
from training_passes import is_training_pass

torch.set_num_threads(1)
BERT = HEADS["sequence classification, BERT"]
EVERY = 3  # passes, of which the last one fails; a window has two, and gradients are synced in the second

repeated: list[str] = []
log = LastLayer.log_failed_pass


def logged(layer: LastLayer, error: Exception) -> None:
    repeated.append(str(error))
    log(layer, error)


LastLayer.log_failed_pass = logged  # type: ignore[method-assign]


def sometimes_in_place(model: Any, rank: int) -> None:
    """Let the last layer change its hidden states in place in some passes of the second process."""
    dense = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[-1].intermediate.dense
    run, n_passes = dense.forward, 0

    def forward(hidden: Tensor) -> Tensor:
        nonlocal n_passes
        if not is_training_pass():
            return run(hidden)
        n_passes += 1
        return run(hidden.mul_(1) if rank == 1 and n_passes % EVERY == 0 else hidden)

    dense.forward = forward


rank, model = int(os.environ["RANK"]), BERT.model()
sometimes_in_place(model, rank)
with all_in_float64():
    errors = window_errors(
        model, BERT.rows(40), num_processes=2, batch_size=2, effective_batch_size=8, audit=False, planner=False
    )
found = gather_object([(max(errors), repeated)])
if rank == 0:
    print("FOUND", json.dumps(found))
PartialState().destroy_process_group()
