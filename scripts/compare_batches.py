"""Measure what accumulation is worth on one device: rows per second, and loss after the same rows, by rows per update.

    .venv/bin/python scripts/compare_batches.py speed
    .venv/bin/python scripts/compare_batches.py quality

`speed` fine-tunes MiniLM on film reviews. For each size of a micro-batch, it prints rows per CPU second if each
micro-batch is an update, and if all updates have 64 rows. Runs alternate, and the first update does not count.

`quality` trains a small ViT from scratch on scikit-learn's digits, in micro-batches of 8 rows. Runs take the same rows
in the same order, with each of several learning rates. β2 of AdamW keeps its half-life in rows, so it is a power of the
number of rows per update. For each number, the table has the rate with the lowest mean validation loss over the seeds.
"""

import sys
import time
from collections.abc import Iterator
from statistics import mean, median
from typing import Any

import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification, set_seed

import ftaccum
from measuring import DEVICE, machine
from workloads import movies

MICRO_BATCHES, ROWS_PER_UPDATE, ROUNDS = (1, 2, 4, 8, 16, 32, 64), 64, 3
UPDATES_OF, RATES, SEEDS, EPOCHS = (8, 32, 128, 512), (5e-4, 1e-3, 2e-3, 4e-3), (0, 1, 2), 5
BETA2, REFERENCE = 0.999, 32  # β2 at this number of rows per update


class Clock(TrainerCallback):
    """The CPU seconds of the process at the end of each update."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.process_time())


def rows_per_second(model: Any, rows: Dataset, batch_size: int, per_update: int) -> float:
    """Return the speed of training after the first update."""
    clock = Clock()
    ftaccum.test_fine_tuning(
        model.to(DEVICE), train_data=rows, n_epochs=1, validation_split=0.0, batch_size=batch_size,
        effective_batch_size=per_update, audit=False, noise_scale=False, callbacks=[clock], verbosity="quiet",
    )  # fmt: skip
    return (len(rows) - per_update) / (clock.times[-1] - clock.times[0])


def compare_speed() -> Iterator[str]:
    workload = movies(seed=0)
    rows = workload.rows.select(range(3 * ROWS_PER_UPDATE))
    sizes = [(b, per_update) for b in MICRO_BATCHES for per_update in (b, ROWS_PER_UPDATE)]
    found: dict[tuple[int, int], list[float]] = {size: [] for size in sizes}
    for _ in range(ROUNDS):
        for size in sizes:
            found[size].append(rows_per_second(workload.new_model(), rows, *size))
    yield f"| rows per micro-batch | rows/s, each an update | rows/s, updates of {ROWS_PER_UPDATE} |"
    yield "| --- | --- | --- |"
    for b in MICRO_BATCHES:
        each, together = (median(found[b, per_update]) for per_update in (b, ROWS_PER_UPDATE))
        yield f"| {b} | {each:.1f} | {together:.1f} |"


def digits() -> Dataset:
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images.reshape(-1, 1, 8, 8) / 16, dtype=torch.float32)
    return Dataset.from_dict({"pixel_values": pixels.numpy(), "labels": labels}).with_format("torch")


def train_on_digits(rows: Dataset, per_update: int, rate: float, seed: int) -> tuple[float, float]:
    """Return the validation loss and accuracy of one run."""
    set_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes))
    result = ftaccum.test_fine_tuning(
        model.to(DEVICE), train_data=rows, batch_size=8, effective_batch_size=per_update, n_epochs=EPOCHS,
        learning_rate=rate, warmup_ratio=0.1, adam_beta2=BETA2 ** (per_update / REFERENCE), random_seed=seed,
        compute_metrics=ftaccum.Accuracy(), evaluate_every=None, audit=False, noise_scale=False, verbosity="quiet",
    )  # fmt: skip
    return result.final_loss, result.metrics[-1]["accuracy"]


def compare_quality() -> Iterator[str]:
    rows = digits()
    yield "| rows per update | updates | best rate | validation loss (range) | accuracy |"
    yield "| --- | --- | --- | --- | --- |"
    for per_update in UPDATES_OF:
        runs = {rate: [train_on_digits(rows, per_update, rate, seed) for seed in SEEDS] for rate in RATES}
        best = min(RATES, key=lambda rate: mean(loss for loss, _ in runs[rate]))
        losses, accuracies = zip(*runs[best], strict=True)
        updates = -(-round(len(rows) * 0.9) // per_update) * EPOCHS
        yield (
            f"| {per_update} | {updates} | {best:g} | {mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f}) "
            f"| {mean(accuracies):.1%} |"
        )


def main() -> None:
    torch.set_num_threads(1)
    print(machine(), flush=True)
    for line in {"speed": compare_speed, "quality": compare_quality}[sys.argv[1]]():
        print(line, flush=True)


if __name__ == "__main__":
    main()
