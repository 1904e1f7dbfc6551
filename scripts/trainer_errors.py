"""Compare Transformers' Trainer and `exact(Trainer)` with one batch in plain PyTorch, for every head.

The models are tiny and in float64, with ragged rows, in windows of 6 and a short one of 3 (micro-batches of 1 or 2).
The script prints the largest relative error of the gradient of a full and of a short window, of the loss that is
logged, and of the weights after an epoch of AdamW with clipping. Trainer adds up the logged loss in float32.

    .venv/bin/python scripts/trainer_errors.py
    .venv/bin/torchrun --nproc_per_node 2 scripts/trainer_errors.py
    .venv/bin/python scripts/trainer_errors.py --trl        # TRL's trainers, in float32, compared with one batch
    .venv/bin/torchrun --nproc_per_node 2 scripts/trainer_errors.py --trl
"""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import datasets
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

import trainers
from ftaccum import InexactLossWarning, exact
from heads import HEADS, Head, all_in_float64, one_batch, relative_error

_OF_TORCHRUN = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
FULL, RATE, NORM = 6, 1e-2, 0.5  # rows of a full window; learning rate; largest gradient norm


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)


def weights_of_one_batch(head: Head) -> nn.Module:
    """Train with one batch per window in a plain loop."""
    model, rows = head.model(), head.rows()
    optimizer = optimizer_of(model)
    for start in range(0, len(rows), FULL):
        model(**one_batch(rows[start : start + FULL])).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), NORM)
        optimizer.step()
        optimizer.zero_grad()
    return model


def weights_of(trainer_class: Any, head: Head, sizes: dict[str, int]) -> nn.Module:
    model = head.model()
    optimizer = optimizer_of(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer_class(
            model=model,
            args=trainers.arguments(folder, max_grad_norm=NORM, **sizes),
            train_dataset=trainers.Listed(head.rows()),
            data_collator=one_batch,
            optimizers=(optimizer, LambdaLR(optimizer, lambda _: 1.0)),
        ).train()
    return model


def errors_of(trainer_class: Any, head: Head, state: PartialState) -> list[float]:
    """Return the errors of a full window, a short one, the logged losses and the weights, on the worst process."""
    sizes = {"per_device_train_batch_size": 2 // state.num_processes, "gradient_accumulation_steps": 3}
    with all_in_float64(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gradients, losses = trainers.window_errors(trainer_class, head.model(), head.rows(), size=FULL, **sizes)
        wanted, found = weights_of_one_batch(head), weights_of(trainer_class, head, sizes)
    weights = relative_error(found.state_dict(), wanted.state_dict())
    every = gather_object([[gradients[0], max(gradients[1:]), max(losses), weights]])
    return [max(of_process) for of_process in zip(*every, strict=True)]


def heads(state: PartialState) -> None:
    if state.is_main_process:
        print("| head | gradient | short window | logged loss | weights |\n|" + " --- |" * 5)
    for name, head in HEADS.items():
        columns = [errors_of(each, head, state) for each in (Trainer, exact(Trainer))]
        if state.is_main_process:
            cells = (" / ".join(f"{error:.1e}" for error in pair) for pair in zip(*columns, strict=True))
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def of_trl(state: PartialState) -> None:
    """Print the errors of TRL's trainers. One batch is the unchanged trainer with k = 1 on one process."""
    import preferences

    if state.is_main_process:
        print("| trainer | alone | with `exact` | reported as inexact |\n|" + " --- |" * 4)
    wanted = one_batches()
    for name, case in preferences.cases().items():
        errors = []
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(record=True) as issued:
            warnings.simplefilter("always")
            for trainer_class in (case.trainer_class, exact(case.trainer_class)):
                found, _ = case.gradients(trainer_class, batch_size=2, k=4 // state.num_processes)
                errors.append(max(relative_error(f, w) for f, w in zip(found, wanted[name], strict=True)))
        worst = [max(of_process) for of_process in zip(*gather_object([errors]), strict=True)]
        if state.is_main_process:
            is_inexact = any(issubclass(each.category, InexactLossWarning) for each in issued)
            print(f"| {name} | {worst[0]:.0e} | {worst[1]:.0e} | {'yes' if is_inexact else 'no'} |", flush=True)


def one_batches() -> dict[str, list[dict[str, torch.Tensor]]]:
    """Return the gradients of windows of one batch by case, computed in a process that has no peers."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gradients.pt"
        kept = {name: value for name, value in os.environ.items() if name not in _OF_TORCHRUN}
        subprocess.run([sys.executable, __file__, "--save", str(file)], check=True, env=kept, stdout=subprocess.DEVNULL)
        return torch.load(file)


def save_one_batches(file: str) -> None:
    import preferences

    torch.save({name: case.one_batch() for name, case in preferences.cases().items()}, file)


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if "--save" in sys.argv:
        save_one_batches(sys.argv[-1])
        return
    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.is_main_process:
        print(f"transformers {transformers.__version__}, {state.num_processes} process(es); Trainer / exact(Trainer)\n")
    (of_trl if "--trl" in sys.argv else heads)(state)
    state.destroy_process_group()


if __name__ == "__main__":
    main()
