"""Train TRL's trainers, made exact, on two processes. Print a JSON line {name: largest relative gradient error}.

The first argument is a file of the gradients of one batch, by name.
"""

import contextlib
import io
import json
import sys
import warnings

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ftaccum import exact
from heads import relative_error
from preferences import cases

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)
warnings.simplefilter("ignore")

found = {}
for name, wanted in torch.load(sys.argv[1]).items():
    case = cases()[name]
    with contextlib.redirect_stdout(io.StringIO()):
        gradients, _ = case.gradients(exact(case.trainer_class), batch_size=2, k=2)
    error = max(relative_error(f, w) for f, w in zip(gradients, wanted, strict=True))
    found[name] = max(gather_object([error]))
if state.is_main_process:
    print(json.dumps(found))
state.destroy_process_group()
