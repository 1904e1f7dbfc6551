"""Compare the padding of one epoch in Trainer: arrival, `batch_rebalance` and the planner, at the same k, untimed.

The rows are short film reviews (recipes/packaged) on one process, in the same order for all three.

    .venv/bin/python scripts/compare_cuts_in_trainer.py
"""

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from torch.utils.data import BatchSampler, RandomSampler
from transformers.trainer_pt_utils import BatchRebalanceSampler

from ftaccum.bridges.trainer.planned_batches import PlannedBatches
from workloads import movies

SEED = 42


def padded(batches: Iterable[Sequence[int]], lengths: Sequence[int]) -> int:
    """Return the token positions of all batches, padding included."""
    return sum(len(rows) * max(lengths[row] for row in rows) for rows in batches)


def samplers(lengths: Sequence[int], batch_size: int, k: int) -> dict[str, Any]:
    """Return the batch samplers by name. Those of Trainer shuffle as `RandomSampler` does with the same seed."""

    def order() -> RandomSampler:
        return RandomSampler(range(len(lengths)), generator=torch.Generator().manual_seed(SEED))

    return {
        "arrival": BatchSampler(order(), batch_size, drop_last=False),
        "`batch_rebalance`": BatchRebalanceSampler(
            list(lengths), batch_size * k, dp_size=1, grad_accum=k, seed=SEED, drop_last=False
        ),
        "planner": PlannedBatches(order(), lengths, batch_size=batch_size, k=k),
    }


def main() -> None:
    lengths = [len(ids) for ids in movies(SEED).rows["input_ids"]]
    print(f"{len(lengths)} rows, {sum(lengths)} tokens, one epoch\n")
    print("| rows × k | cut | micro-batches | positions | fewer positions | ms a window |\n|" + " --- |" * 6)
    for batch_size, k in ((8, 4), (4, 8)):
        without = None
        for name, sampler in samplers(lengths, batch_size, k).items():
            start = time.perf_counter()
            batches = list(sampler)
            seconds = (time.perf_counter() - start) / (len(batches) / k)
            positions = padded(batches, lengths)
            without = without or positions
            cells = [f"{batch_size} × {k}", name, f"{len(batches):,}", f"{positions:,}",
                     f"{1 - positions / without:.1%}", f"{1e3 * seconds:.2f}"]  # fmt: skip
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
