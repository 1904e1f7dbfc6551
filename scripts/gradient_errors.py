"""The gradient of every head against one batch in plain PyTorch, as a table: relative error, the largest of any window.

Tiny models in float64, 9 ragged rows in windows of 6 and 3 (micro-batches of 1 or 2). "as it is": the head may compute
a part in float32 whatever the model's precision; "all float64": it may not. `loss / k` is the usual way, on one window
of 7 rows in micro-batches of 2, 2, 2, 1.

    .venv/bin/python scripts/gradient_errors.py
    .venv/bin/torchrun --nproc_per_node 2 scripts/gradient_errors.py
"""

import contextlib
import io
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from exactness import window_errors
from heads import HEADS, Head, all_in_float64, one_batch, one_batch_gradient, relative_error


def ours(head: Head, state: PartialState) -> float:
    sizes = {"batch_size": 2 // state.num_processes, "effective_batch_size": 6}
    with contextlib.redirect_stdout(io.StringIO()):
        errors = window_errors(head.model(), head.rows(), num_processes=state.num_processes, **sizes)
    return max(gather_object(errors))


def divided_by_k(head: Head) -> float:
    model, rows = head.model(), head.rows(7)
    wanted = one_batch_gradient(model, rows)
    for start in range(0, 7, 2):
        (model(**one_batch(rows[start : start + 2])).loss / 4).backward()
    return relative_error({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, wanted)


def main() -> None:
    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.is_main_process:
        print(f"{state.num_processes} process(es)\n")
        print("| head | `loss / k` | as it is | all float64 |\n| --- | --- | --- | --- |")
    for name, head in HEADS.items():
        as_it_is = ours(head, state)
        with all_in_float64():
            in_float64 = ours(head, state)
        if state.is_main_process:
            print(f"| {name} | {divided_by_k(head):.2g} | {as_it_is:.0e} | {in_float64:.0e} |", flush=True)
    state.destroy_process_group()


if __name__ == "__main__":
    main()
