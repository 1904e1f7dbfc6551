"""Train the heads that are named, and a loss that cannot be accumulated exactly, on two processes.

Print a JSON line {head: largest relative gradient error on any process}, and another with each process's error for the
loss.
"""

import json
import sys

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from exactness import window_errors
from ftaccum import InexactLossError, test_fine_tuning
from heads import HEADS, all_in_float64

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)

found = {}
with all_in_float64():
    for name in sys.argv[1:]:
        head = HEADS[name]
        # Windows of 6 rows and of 3: in the second, one process has 2 rows and the other 1 and a dummy.
        errors = window_errors(head.model(), head.rows(), num_processes=2, batch_size=1, gradient_accumulation_steps=3)
        assert len(errors) == 2
        found[name] = max(gather_object(errors))

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3))
rows = [(torch.randn(4), torch.tensor(n % 3)) for n in range(8)]
try:
    test_fine_tuning(model, train_data=rows, loss_fn=torch.nn.CrossEntropyLoss(), on_inexact="error", progress=False)
except InexactLossError as error:
    told = gather_object([str(error)])
if state.is_main_process:
    print("ERRORS", json.dumps(found))
    print("TOLD", json.dumps(told))
state.destroy_process_group()
