"""Compare the cheapest split of a window with other splits of the same rows, on the benchmark's rows, without timing.

"Cost" is in tokens, with the planner's default costs: 64 + padded tokens + 0.0005 × tokens × width per pass.

    .venv/bin/python scripts/compare_cuts.py
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ftaccum import plan
from ftaccum.planning.micro_batches import DEFAULT_COSTS, BatchLimits, MicroBatchPlanner, MicroBatchRows
from workloads import WORKLOADS

BATCH = 8
SEED = 42

Cut = Callable[[Sequence[int]], list[MicroBatchRows]]


def equal_slices(lengths: Sequence[int]) -> list[MicroBatchRows]:
    """Sort rows by length, and fill every micro-batch except the last."""
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    parts = [rows[n : n + BATCH] for n in range(0, len(rows), BATCH)]
    return [MicroBatchRows(tuple(p), len(p) * lengths[p[0]], lengths[p[0]]) for p in parts]


def by(planner: MicroBatchPlanner) -> Cut:
    return lambda lengths: planner.split(tuple(range(len(lengths))), lengths)[0]


def main() -> None:
    print("| rows | window | cut | padded per token | passes a window | cost a token |\n|" + " --- |" * 6)
    for name, workload in WORKLOADS.items():
        lengths = [len(ids) for ids in workload(SEED).rows["input_ids"]]
        cuts: dict[str, Cut] = {
            "order of arrival": by(MicroBatchPlanner(BatchLimits(BATCH), None)),
            "sorted, equal slices": equal_slices,
            f"cheapest, {BATCH} rows at most": by(MicroBatchPlanner(BatchLimits(BATCH))),
            f"cheapest, {BATCH} × the longest row in tokens at most": by(
                MicroBatchPlanner(BatchLimits(None, BATCH * max(lengths)))
            ),
        }
        for k in (8, 32):
            windows = [w.rows for w in plan(len(lengths), batch_size=BATCH, gradient_accumulation_steps=k, n_epochs=1,
                                            validation_split=0.0, random_seed=SEED).windows(0)][:-1]  # fmt: skip
            tokens = sum(lengths[row] for rows in windows for row in rows)
            for kind, cut in cuts.items():
                pieces = [piece for rows in windows for piece in cut([lengths[row] for row in rows])]
                padded = sum(piece.tokens for piece in pieces)
                cost = sum(DEFAULT_COSTS.of(piece.tokens, piece.width) for piece in pieces)
                cells = [name, f"{BATCH * k}", kind, f"{padded / tokens:.3f}", f"{len(pieces) / len(windows):.1f}",
                         f"{cost / tokens:.2f}"]  # fmt: skip
                print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
