"""The loss of many positions in bf16: its error, memory and time from all logits, from chunks, and by Liger."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftaccum.objective.chunked_loss import ChunkedLoss
from ftaccum.objective.liger_loss import liger_loss

from .job import Job, accelerator

# positions, hidden size, vocabulary
_ON_A_GPU = (4096, 2048, 65_536)
_ON_A_CPU = (64, 16, 128)  # shows only that it works
_CHUNKS = 8
_FACTOR = 0.3  # of the loss, as that of a micro-batch in an update
_MOST_ROUNDS = 10
_SHARE = 0.7  # of the part's time; the rest is for the start of the process


class _Other(nn.Linear):
    """A layer that Liger's kernels are not used for."""


def all_logits(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets)


def in_chunks(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor | None:
    other = _Other(head.in_features, head.out_features, bias=False, device="meta")
    other.weight = head.weight
    return ChunkedLoss(other, len(targets) // _CHUNKS)(hidden, targets)


def by_liger(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor | None:
    return liger_loss(hidden, targets, head, len(targets) // _CHUNKS)


WAYS: dict[str, Callable[[nn.Linear, Tensor, Tensor], Tensor | None]] = {
    "all logits": all_logits,
    "chunks": in_chunks,
    "Liger": by_liger,
}


@dataclass(frozen=True)
class Pass:
    """What one forward and backward pass has computed and taken.

    Attributes:
        values: the loss, and the gradients of the hidden states and the weight.
        peak: the most bytes that it took; None on a CPU.
    """

    values: dict[str, Tensor]
    peak: int | None
    seconds: float

    def errors(self, wanted: "Pass") -> dict[str, float]:
        """Return the relative error of each value."""
        return {
            name: float((self.values[name].float() - value).norm() / value.norm())
            for name, value in wanted.values.items()
        }


def measure_head_losses(job: Job, rank: int) -> dict[str, Any]:  # noqa: ARG001
    """Return the errors, peak and median seconds of each way; none of Liger where it does not run.

    The errors are those against all logits in float32 of the same weights.
    """
    started = time.monotonic()
    n, width, vocabulary = sizes = _ON_A_CPU if accelerator() is None else _ON_A_GPU
    device = accelerator() or torch.device("cpu")
    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False, device=device, dtype=torch.bfloat16)
    hidden = torch.randn(n, width, device=device, dtype=torch.bfloat16)
    targets = torch.randint(vocabulary, (n,), device=device)
    wanted = _run("all logits", copy.deepcopy(head).float(), hidden.float(), targets)
    assert wanted is not None
    found: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        if (first := _run(way, head, hidden, targets)) is not None:  # compiles kernels
            found[way] = {"errors": first.errors(wanted), "peak": None, "seconds": []}
    del wanted, first
    for _ in range(_MOST_ROUNDS):
        for way, numbers in found.items():
            timed = _run(way, head, hidden, targets)
            assert timed is not None
            numbers["peak"] = timed.peak
            numbers["seconds"].append(timed.seconds)
        if time.monotonic() - started > _SHARE * job.seconds:
            break
    return {"sizes": sizes, "ways": {way: each | {"seconds": median(each["seconds"])} for way, each in found.items()}}


def _run(way: str, head: nn.Linear, hidden: Tensor, targets: Tensor) -> Pass | None:
    head.zero_grad()
    hidden = hidden.detach().requires_grad_()
    before = _peak_from_now()
    begun = time.perf_counter()
    loss = WAYS[way](head, hidden, targets)
    if loss is None:
        return None
    (_FACTOR * loss).backward()
    if accelerator() is not None:
        torch.accelerator.synchronize()
    seconds = time.perf_counter() - begun
    peak = None if before is None else torch.accelerator.max_memory_allocated() - before
    assert hidden.grad is not None
    assert head.weight.grad is not None
    return Pass({"loss": loss.detach(), "hidden": hidden.grad, "weight": head.weight.grad}, peak, seconds)


def _peak_from_now() -> int | None:
    """Measure the peak anew, and return the bytes that tensors take now; None on a CPU."""
    if accelerator() is None:
        return None
    torch.accelerator.synchronize()
    torch.accelerator.reset_peak_memory_stats()
    return torch.accelerator.memory_allocated()
