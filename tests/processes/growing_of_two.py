"""Windows that are carried and that grow, on two processes: prints a JSON line of differences and gradient errors."""

import json
import sys

import torch
from accelerate import PartialState

from exactness import window_errors
from heads import HEADS, all_in_float64
from invariance import NAMES, difference, trained
from test_growing_windows import CHANGING, cut_otherwise

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)

alone = torch.load(sys.argv[1], weights_only=False)
differences = {
    f"{n}, {batch_size}": difference(
        alone[n], trained(NAMES[2], **cut_otherwise(arguments, batch_size, num_processes=2))
    )
    for n, arguments in enumerate(CHANGING)
    for batch_size in (1, 2)
}
head = HEADS["causal LM, Llama"]
with all_in_float64():
    errors = window_errors(
        head.model(), head.rows(), num_processes=2, batch_size=1, gradient_accumulation_steps=[(0, 2), (1, 1), (3, 5)],
        n_epochs=3, remainder="carry",
    )  # fmt: skip
if state.is_main_process:
    print("FOUND", json.dumps({"differences": differences, "errors": errors}))
state.destroy_process_group()
