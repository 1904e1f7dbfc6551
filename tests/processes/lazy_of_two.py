"""Train a classifier on two processes whose last layer fails with lazy tensors in some passes of the second process.

Prints a JSON line: the largest relative error of the windows' gradients, and how many windows were repeated.
"""

import json
import logging
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from exactness import window_errors
from ftaccum.runtime.log import logger
from heads import HEADS, all_in_float64
from training_passes import is_training_pass

torch.set_num_threads(1)
BERT = HEADS["sequence classification, BERT"]
FAILING = (1, 4)  # training passes: the last one of its window, in which gradients are synced, and another one


class _Repeated(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.n += "in one window" in record.getMessage()


def sometimes_in_place(model: Any, rank: int) -> None:
    """Let the last layer change its hidden states in place in some passes of the second process."""
    dense = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[-1].intermediate.dense
    run, n_passes = dense.forward, 0

    def forward(hidden: Tensor) -> Tensor:
        nonlocal n_passes
        if not is_training_pass():
            return run(hidden)
        n_passes += 1
        return run(hidden.mul_(1) if rank == 1 and n_passes - 1 in FAILING else hidden)

    dense.forward = forward


rank, model, repeated = PartialState().process_index, BERT.model(), _Repeated()
sometimes_in_place(model, rank)
logger.addHandler(repeated)
with all_in_float64():
    errors = window_errors(
        model, BERT.rows(16), num_processes=2, batch_size=2, effective_batch_size=8, audit=False, verbosity="debug"
    )
found = gather_object([(max(errors), repeated.n)])
if rank == 0:
    print("FOUND", json.dumps(found))
PartialState().destroy_process_group()
