"""Compare the time of the cross entropy of all logits at once with that of logits in chunks.

Forward and backward pass of an output embedding and its loss, without a model: N positions, hidden size H, vocabulary
V. The ways to compute them run one after another in each round, on one thread. Milliseconds of the processor, which
exclude the time in which other programs used the core; medians over the rounds, after one to warm up.

- plain: all logits, in float32 for the cross entropy.
- ftaccum: `ftaccum.objective.chunked_loss`; "–" where it leaves the logits whole.
- torch: `torch.nn.functional.linear_cross_entropy` with chunks of --chunk positions.
- recomputed: chunks of as many positions, whose logits the backward pass computes again.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_chunks.py
"""

import argparse
import os
import time
from collections.abc import Callable
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftaccum.objective.chunked_loss import ChunkedLoss
from measuring import machine

SIZES = ((200, 576, 49_152), (1024, 576, 49_152), (256, 384, 30_522))
TYPES = (torch.float32, torch.bfloat16)
Way = Callable[[nn.Linear, Tensor, Tensor], Tensor | None]


def plain(head: nn.Linear, hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden_NH).float(), targets_N)


def ways(chunk: int) -> dict[str, Way]:
    def by_torch(head: nn.Linear, hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)
        return F.linear_cross_entropy(hidden_NH, head.weight, targets_N, options=options)

    def recomputed(head: nn.Linear, hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
        pieces = zip(hidden_NH.split(chunk), targets_N.split(chunk), strict=True)
        means = [checkpoint(plain, head, *piece, use_reentrant=False) * len(piece[1]) for piece in pieces]
        return torch.stack(means).sum() / len(targets_N)

    found: dict[str, Way] = {"plain": plain, "ftaccum": lambda head, *given: ChunkedLoss(head)(*given)}
    return found | ({"torch": by_torch} if hasattr(F, "linear_cross_entropy") else {}) | {"recomputed": recomputed}


def milliseconds(way: Way, head: nn.Linear, hidden_NH: Tensor, targets_N: Tensor) -> float:
    """Return the time of one forward and backward pass; NaN if the logits are not computed in chunks."""
    head.zero_grad()
    begun = time.process_time()
    loss = way(head, hidden_NH, targets_N)
    if loss is None:
        return float("nan")
    loss.backward()
    return 1000 * (time.process_time() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=256, help="positions of a chunk")
    options = parser.parse_args()
    torch.set_num_threads(1)
    compared = ways(options.chunk)
    print(machine(), f"\n\n| (N, H, V), type | {' | '.join(compared)} |\n|" + " --- |" * (1 + len(compared)))
    for dtype in TYPES:
        for n, hidden, vocabulary in SIZES:
            torch.manual_seed(0)
            head = nn.Linear(hidden, vocabulary, bias=False, dtype=dtype)
            hidden_NH = torch.randn(n, hidden, dtype=dtype, requires_grad=True)
            targets_N = torch.randint(vocabulary, (n,))
            rounds = [
                {name: milliseconds(way, head, hidden_NH, targets_N) for name, way in compared.items()}
                for _ in range(options.rounds + 1)
            ]
            times = {name: median(found[name] for found in rounds[1:]) for name in compared}
            cells = [_cell(time, times["plain"]) for time in times.values()]
            print(f"| ({n}, {hidden}, {vocabulary}), {dtype} | {' | '.join(cells)} |", flush=True)


def _cell(time: float, of_plain: float) -> str:
    return "–" if time != time else f"{time:.0f} ({time / of_plain:.2f} ×)"


if __name__ == "__main__":
    main()
