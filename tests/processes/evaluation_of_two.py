"""Evaluation on two processes: prints a JSON line of what each of them got."""

import json

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from evaluated import evaluated
from ftaccum import Accuracy

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)

TAGGING = "token classification, BERT"
found = {"losses": {}, "order": []}
for name in ("causal LM, Llama", TAGGING, "question answering, BERT"):
    found["losses"][name] = gather_object([evaluated(name, batch_size=2).initial_loss])
accuracy = evaluated(TAGGING, batch_size=2, compute_metrics=Accuracy(), learning_rate=1e-12).metrics
found["accuracy"] = gather_object([accuracy])
# The function is called on the main process alone, before the first update and after the epoch, with the rows of both
# in their order.
evaluated(
    TAGGING,
    batch_size=2,
    compute_metrics=lambda p: found["order"].append(p.label_ids[:, 0].tolist()) or {},
)
try:
    evaluated(TAGGING, batch_size=2, compute_metrics=lambda _: 1 / 0)
except (ZeroDivisionError, RuntimeError) as error:
    found["error"] = gather_object([type(error).__name__])
if state.is_main_process:
    print("FOUND", json.dumps(found))
state.destroy_process_group()
