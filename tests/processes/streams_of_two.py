"""Train on streams on two processes. Print a JSON line of differences from one process, rows seen, and errors."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

from ftaccum import DataError
from ftaccum.data import iterable as streaming
from heads import HEADS, all_in_float64
from invariance import difference
from streams import Contrary, Plane, Seen, Stream, point
from test_streaming import BERT, FOR_TWO, run

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)
streaming.LOOKED_AT = 8

alone = torch.load(sys.argv[1], weights_only=False)
differences = {}
for name, before in alone.items():
    for batch_size in (1, 4):
        model = HEADS[name].model()
        with all_in_float64():
            rows = HEADS[name].rows
            result = run(model, Stream(rows(31)), **FOR_TWO, val_data=rows(5), batch_size=batch_size)
        differences[f"{name}, {batch_size}"] = difference(before, (model.state_dict(), result))

seen = {}
for kind, stream in (("contrary", Contrary(40)), ("in order", Stream([point(n) for n in range(40)]))):
    with Seen() as on_this:
        run(Plane(), stream, loss_fn=nn.CrossEntropyLoss(), n_epochs=2, effective_batch_size=9)
    seen[kind] = gather_object([on_this.windows])


def error_of(stream: Any, folder: str | None = None) -> str:
    try:
        run(BERT.model(), stream, output_dir=folder)
    except DataError as error:
        return str(error)
    return "none"


class Closed(dict[str, Any]):
    def __reduce__(self) -> Any:
        raise TypeError("not to be sent")


with tempfile.TemporaryDirectory() as folder:
    # The second process's stream would fail at once, but only the first process reads.
    fails = Stream(BERT.rows(40), fails_after=0 if state.process_index else 23)
    errors = gather_object([[error_of(fails, folder), error_of(Stream([Closed(row) for row in BERT.rows(9)]))]])
    if state.is_main_process:
        lines = [json.loads(line) for line in (Path(folder) / "ledger.jsonl").read_text().splitlines()]
        found = {
            "differences": differences,
            "seen": seen,
            "errors": errors,
            "ledger": [line["rows"] for line in lines if "window" in line],
            "alone again": [torch.distributed.get_rank(), int(os.environ["WORLD_SIZE"])],
        }
        print("FOUND", json.dumps(found))
state.destroy_process_group()
