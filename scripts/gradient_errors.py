"""Compare the gradient of every head with that of one batch in plain PyTorch, and print the largest relative error.

The models are tiny and in float64, with 9 ragged rows in windows of 6 and 3 (micro-batches of 1 or 2). "as it is": the
head may compute parts in float32, whatever the model's precision. "all float64": it may not. `loss / k` is the usual
method, on one window of 7 rows in micro-batches of 2, 2, 2 and 1.

With `--precisions`, two heads run in every precision on a window of 64 rows in k micro-batches, and are compared with
one batch in float64 with the same weights. Errors are means over 8 windows.

    .venv/bin/python scripts/gradient_errors.py
    .venv/bin/torchrun --nproc_per_node 2 scripts/gradient_errors.py
    .venv/bin/python scripts/gradient_errors.py --precisions
"""

import contextlib
import copy
import io
import os
import sys
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from exactness import window_errors
from ftaccum import test_fine_tuning
from heads import HEADS, Head, RecordingOptimizer, all_in_float64, one_batch, one_batch_gradient, relative_error

# Type of the weights, and arguments of `test_fine_tuning`.
PRECISIONS = {
    "float32": (torch.float32, {}),
    "bf16 autocast": (torch.float32, {"mixed_precision": "bf16"}),
    "fp16 autocast, scaled": (torch.float32, {"mixed_precision": "fp16"}),
    "bf16 weights": (torch.bfloat16, {}),
    "bf16 weights, `accumulate_in_fp32`": (torch.bfloat16, {"accumulate_in_fp32": True}),
    "fp16 weights": (torch.float16, {}),
    "fp16 weights, `accumulate_in_fp32`": (torch.float16, {"accumulate_in_fp32": True}),
}
STEPS = (1, 4, 16, 64)


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


def of_precision(head: Head, dtype: torch.dtype, k: int, seed: int, arguments: dict[str, Any]) -> float:
    model, rows = head.model().to(dtype), head.rows(64, seed)
    wanted = one_batch_gradient(copy.deepcopy(model).double(), rows)
    optimizer = RecordingOptimizer(model)
    with contextlib.redirect_stdout(io.StringIO()):
        test_fine_tuning(
            model, train_data=rows, optimizer=optimizer, batch_size=64 // k, effective_batch_size=64, n_epochs=1,
            validation_split=0.0, gradient_clip_norm=None, progress=False, **arguments,
        )  # fmt: skip
    return relative_error({name: g.double() for name, g in optimizer.gradients[0].items()}, wanted)


def precisions() -> None:
    for name in ("causal LM, Llama", "sequence classification, BERT"):
        print(f"| {name} | " + " | ".join(f"k = {k}" for k in STEPS) + " |\n" + "| --- " * (1 + len(STEPS)) + "|")
        for precision, (dtype, arguments) in PRECISIONS.items():
            means = [mean(of_precision(HEADS[name], dtype, k, seed, arguments) for seed in range(8)) for k in STEPS]
            print(f"| {precision} | {' | '.join(f'{error:.1e}' for error in means)} |", flush=True)
        print()


def main() -> None:
    if "--precisions" in sys.argv:
        precisions()
        return
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
