"""Evaluate on two processes. Print a JSON line of the results of each."""

import json
import tempfile
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from evaluated import evaluated
from ftaccum import Accuracy, MetricsError, SettingsError
from ftaccum.training import metrics, predictions
from test_generation import OPTIONS, PROMPTS, lively

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)

CAUSAL, TAGGING = "causal LM, Llama", "token classification, BERT"
found = {"losses": {}, "order": []}
for name in (CAUSAL, TAGGING, "question answering, BERT"):
    found["losses"][name] = gather_object([evaluated(name, batch_size=2).initial_loss])
accuracy = evaluated(TAGGING, batch_size=2, compute_metrics=Accuracy(), learning_rate=1e-12).metrics
found["accuracy"] = gather_object([accuracy])
# Only the main process calls the function, before the first update and after the epoch, with the rows of both in
# order.
evaluated(
    TAGGING,
    batch_size=2,
    compute_metrics=lambda p: found["order"].append(p.label_ids[:, 0].tolist()) or {},
)


class OwnError(Exception):
    """An error that cannot be unpickled, because its arguments are not its text."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__("broken")
        self.numbers = one, two


calls = []


def fails_after_an_epoch(_: object) -> dict[str, float]:
    calls.append(1)
    if len(calls) == 2:
        raise OwnError(1, 2)
    return {}


with tempfile.TemporaryDirectory() as folder:
    folders = broadcast_object_list([folder])
    try:
        evaluated(TAGGING, batch_size=2, compute_metrics=fails_after_an_epoch, output_dir=folders[0])
    except MetricsError as error:
        found["errors"] = gather_object([str(error)])
        found["cause"] = type(error.__cause__).__name__
    found["checkpoints"] = sorted(path.name for path in Path(folders[0]).glob("checkpoints/update-*"))
    state.wait_for_everyone()
try:
    evaluated(TAGGING, batch_size=2, compute_metrics=lambda _: 3)
except SettingsError as error:
    found["no metrics"] = gather_object([str(error)])

# With pieces of a batch each, the processes send unequal numbers of pieces, and only the main process gets them.
predictions._PIECE = 1
gathered = []
gather_on_main = predictions.gather_on_main
metrics.gather_on_main = lambda *given: gathered.append(gather_on_main(*given)) or gathered[-1]
evaluated(
    CAUSAL,
    batch_size=4,
    eval_batch_size=1,
    learning_rate=1e-12,
    compute_metrics=lambda p: found.update(ids=p.predictions.tolist()) or {},
    preprocess_logits_for_metrics=lambda logits, _: logits.argmax(-1),
)
found["gathered"] = gather_object([[len(batches) for batches in gathered]])
evaluated(
    CAUSAL,
    model=lively(CAUSAL),
    val_data=PROMPTS[CAUSAL],
    batch_size=2,
    learning_rate=1e-12,
    compute_metrics=lambda p: found.update(texts=p.predictions.tolist()) or {},
    generation_kwargs=OPTIONS | {"do_sample": True, "top_k": 0},
)


def fails_on_the_second(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    if state.process_index == 1:
        raise OwnError(1, 2)
    return logits


def of_unequal_shape(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return logits.mean() if state.process_index == 1 else logits


for name, preprocess in {"failed": fails_on_the_second, "shape": of_unequal_shape}.items():
    try:
        evaluated(TAGGING, batch_size=2, compute_metrics=lambda _: {}, preprocess_logits_for_metrics=preprocess)
    except (MetricsError, SettingsError) as error:
        found[name] = gather_object([f"{type(error).__name__}: {error}"])
if state.is_main_process:
    print("FOUND", json.dumps(found))
state.destroy_process_group()
