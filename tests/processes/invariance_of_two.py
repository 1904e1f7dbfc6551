"""Run the recipes of `invariance`, and carried and growing windows, on two processes. Print a JSON line of the largest
differences from a single process, of gradient errors, and of a run whose tracker and disk fail.

The test wrote the single-process runs to a file, since they cannot run in this process group.
"""

import json
import sys

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from exactness import window_errors
from heads import HEADS, all_in_float64
from invariance import BALANCED, NAMES, difference, trained
from test_growing_windows import CHANGING, cut_otherwise
from test_trackers import Told, failing_in

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)

alone, growing, balanced = torch.load(sys.argv[1], weights_only=False)
found = {}
for name in NAMES:
    for batch_size in (1, 4, 6):
        run = trained(name, batch_size)
        assert run[1].num_processes == 2
        found[f"{name}, {batch_size}"] = difference(alone[name], run)
for n, arguments in enumerate(CHANGING):
    for batch_size in (1, 2):
        run = trained(NAMES[2], **cut_otherwise(arguments, batch_size, num_processes=2))
        found[f"growing {n}, {batch_size}"] = difference(growing[n], run)
for name, arguments in BALANCED.items():
    found[f"balanced, {name}"] = difference(balanced[name], trained(name, 4, **arguments))
head = HEADS["causal LM, Llama"]
with all_in_float64():
    gradients = window_errors(
        head.model(), head.rows(), num_processes=2, batch_size=1, gradient_accumulation_steps=[(0, 2), (1, 1), (3, 5)],
        n_epochs=3, remainder="carry",
    )  # fmt: skip
tracker = Told(failing_in("log"))
troubled = trained(
    NAMES[1], 4, log_with=tracker, output_dir=sys.argv[2]
)  # where a folder has the name of the result file
found["troubled"] = difference(alone[NAMES[1]], troubled)
told = gather_object([(tracker.done, troubled[1].unwritten)])
if state.is_main_process:
    print("FOUND", json.dumps({"differences": found, "gradients": gradients, "told": told}))
state.destroy_process_group()
