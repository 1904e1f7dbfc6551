"""Evaluate a loss over the window on two processes. Print a JSON line of the results of each."""

import json

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ftaccum import DataError
from windowed import VAL_ROWS, Breaking, BreaksRow9, drawing, trained

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)

found = {
    "losses": gather_object([trained(batch_size=1).initial_loss]),
    "one row": gather_object([trained(val_data=VAL_ROWS[:9]).initial_loss]),  # in the last group
    "draws": gather_object([trained(loss_fn=drawing).initial_loss]),
}
rows = Breaking()
try:
    trained(val_data=rows, batch_size=1, callbacks=[BreaksRow9(rows)])
except DataError as error:
    found["unreadable"] = gather_object([str(error)])
if state.is_main_process:
    print("FOUND", json.dumps(found))
state.destroy_process_group()
