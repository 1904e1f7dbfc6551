"""Measure the cost of the self-check before the first update, and print its warnings for three faulty losses.

    .venv/bin/python scripts/self_check.py

The cost is for MiniLM on film reviews at batch 8 × 4, in forward passes and as a share of the time of 100 updates.
"""

import argparse
import contextlib
import io
import warnings
from statistics import median
from typing import Any
from unittest.mock import patch

import datasets
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import ftaccum
from ftaccum.objective.self_check import measured_objective
from measuring import DEVICE, machine, now, quiet
from workloads import Workload, movies

_UPDATES, _BATCH_SIZE, _K = 100, 8, 4


def cost(workload: Workload, rounds: int) -> None:
    """Print the forward passes and the seconds of the check, and the seconds of a run."""
    rows = workload.rows.select(range(_UPDATES * _BATCH_SIZE * _K))
    shares, checks = [], []
    for number in range(rounds):
        model, passes, check = workload.new_model().to(DEVICE), [0], [0.0, 0.0]
        model.register_forward_pre_hook(lambda *_, passes=passes: passes.__setitem__(0, passes[0] + 1))

        def timed(*args: Any, check: Any = check, passes: Any = passes, **given: Any) -> Any:
            before, started = passes[0], now()
            found = measured_objective(*args, **given)
            check[:] = [passes[0] - before, now() - started]
            return found

        with quiet(number), patch("ftaccum.training.build_data.measured_objective", timed):
            result = ftaccum.test_fine_tuning(
                model, train_data=rows, n_epochs=1, validation_split=0.0, batch_size=_BATCH_SIZE,
                gradient_accumulation_steps=_K, progress=False,
            )  # fmt: skip
        checks.append(check)
        shares.append(check[1] / result.training_time)
        print(f"{check[0]:.0f} forward passes, {check[1]:.2f} s; {_UPDATES} updates {result.training_time:.1f} s")
    print(f"Median: {100 * median(shares):.2f}% of {_UPDATES} updates, {median(c[1] for c in checks):.2f} s")


class Classifier(nn.Module):
    """A classifier on the normalised mean embedding, over all positions or only those that are not padding."""

    def __init__(self, norm: nn.Module, heed_mask: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(100, 16), norm, nn.Linear(16, 3)
        self._heed_mask = heed_mask

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        weights = attention_mask if self._heed_mask else torch.ones_like(attention_mask)
        pooled = (self.embed(input_ids) * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
        return self.head(self.norm(pooled))


def contrastive(outputs: Tensor, _: Any) -> Tensor:
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs), device=outputs.device))


def classes(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch["labels"])


def faults() -> None:
    """Print the warnings for three faulty losses."""
    draw = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(100, (n % 9 + 2,), generator=draw), "labels": n % 3} for n in range(_BATCH_SIZE)
    ]
    seeded = {
        "batch norm in train mode": (Classifier(nn.BatchNorm1d(16)), classes),
        "an in-batch contrastive loss": (Classifier(nn.LayerNorm(16)), contrastive),
        "a loss that ignores its mask": (Classifier(nn.LayerNorm(16), heed_mask=False), classes),
    }
    for name, (model, loss_fn) in seeded.items():
        with warnings.catch_warnings(record=True) as told, contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("always")
            ftaccum.test_fine_tuning(
                model, train_data=rows, loss_fn=loss_fn, n_epochs=1, validation_split=0.0,
                gradient_accumulation_steps=2, progress=False,
            )  # fmt: skip
        print(f"\n{name}:")
        for each in told:
            print(f"  {each.category.__name__}: {each.message}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only-faults", action="store_true", help="skip the cost")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    print(machine())
    if not options.only_faults:
        cost(movies(42), options.rounds)
    faults()


if __name__ == "__main__":
    main()
