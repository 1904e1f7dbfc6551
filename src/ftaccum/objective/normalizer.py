"""The denominator of the loss, and its only owner.

A window's gradient is ∇ Σ ℓ(item) / N, with N its loss items on all processes. A micro-batch yields a mean over its
own n items, so its part of the window's loss is mean × n / N. Nothing outside this file divides or multiplies a
loss: what Accelerate and DDP divide by later is multiplied in here beforehand.

A loss may have several terms, each a mean over items of its own kind; each has its own n and N.
"""

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

Counts = Mapping[str, float]  # loss items by term; whole, unless the user counts weights
Means = Mapping[str, Tensor]  # mean loss by term, each a scalar


class LossNormalizer:
    """N of one window, counted over all processes before its first forward pass."""

    def __init__(
        self, counts: Sequence[Counts], terms: Sequence[str], accelerator: Accelerator, factor: float = 1.0
    ) -> None:
        """Sum the items of this process's micro-batches, then of all processes.

        On several processes N stays on the device, so that counting does not wait for it.

        Args:
            factor: what the window's gradient is multiplied by.
        """
        self._factor = factor
        self.terms = tuple(terms)
        self._passes = len(counts)
        self._processes = accelerator.num_processes
        mine = [sum(each[term] for each in counts) for term in terms]
        self.items_T = torch.tensor(mine, dtype=_wide(accelerator.device))
        if self._processes > 1:
            self.items_T = accelerator.reduce(self.items_T.to(accelerator.device), "sum")

    def contribution(self, means: Means, counts: Counts) -> Tensor:
        """A micro-batch's part of the window's loss: Σ over terms of mean × n / N.

        The contributions of a window add up to its loss, over passes and processes.

        Args:
            means: of the terms that have a mean; one over no items must be left out.
            counts: n by term. A dummy's are 0, and its contribution is an exact zero with a gradient of zeros.
        """
        return weighted_sum(means, counts, dict(zip(self.terms, self.items_T, strict=True)))

    def for_backward(self, contribution: Tensor) -> Tensor:
        """The contribution times what it will be divided by: Accelerate divides by the passes of the window, and
        DDP averages over processes."""
        return contribution * (self._passes * self._processes * self._factor)


class WeightedMeans:
    """Means over loss items, gathered as (sum, count) pairs until they are read."""

    def __init__(self, terms: Sequence[str], device: torch.device) -> None:
        self.terms = tuple(terms)
        self.sums_T = torch.zeros(len(terms), dtype=_wide(device), device=device)
        self.items_T = torch.zeros_like(self.sums_T)

    def add(self, means: Means, counts: Counts) -> None:
        """Adds a micro-batch of this process, without waiting for the device."""
        for t, term in enumerate(self.terms):
            if counts[term]:
                self.sums_T[t] += widened(means[term].detach()) * counts[term]
                self.items_T[t] += counts[term]

    def merge(self, other: "WeightedMeans") -> None:
        self.sums_T += other.sums_T
        self.items_T += other.items_T

    def read(self) -> dict[str, float]:
        """The mean of each term, NaN where it has no items."""
        return {term: s / n if n else float("nan") for term, (s, n) in zip(self.terms, self._pairs(), strict=True)}

    def total(self) -> float:
        """The loss that is trained on: the sum of the means. A term without items is left out; NaN where all are, and
        where a mean is NaN."""
        known = [s / n for s, n in self._pairs() if n]
        return sum(known) if known else float("nan")

    def _pairs(self) -> list[tuple[float, float]]:
        return list(zip(self.sums_T.tolist(), self.items_T.tolist(), strict=True))


def weighted_sum(means: Means, counts: Counts, items: Mapping[str, float | Tensor]) -> Tensor:
    """Return Σ over terms of mean × n / N, with n from `counts` and N from `items`."""
    parts = [widened(mean) * (counts[term] / items[term] if counts[term] else 0.0) for term, mean in means.items()]
    return torch.stack(parts).sum()


def means_of_sums(sums: Means, counts: Counts) -> dict[str, Tensor]:
    """What a loss handed over as Σℓ is as a mean over the batch's items; a term without items stays 0."""
    return {term: widened(found) / (counts[term] or 1) for term, found in sums.items()}


def gathered(means: Sequence[WeightedMeans], accelerator: Accelerator) -> list[WeightedMeans]:
    """Each of `means` summed over all processes and brought to the host: one collective and one wait for all."""
    if not means:
        return []
    pairs_M2T = torch.stack([torch.stack([m.sums_T, m.items_T]) for m in means])
    if accelerator.num_processes > 1:
        pairs_M2T = accelerator.reduce(pairs_M2T, "sum")
    summed = []
    for sums_T, items_T in pairs_M2T.cpu():
        summed.append(WeightedMeans(means[0].terms, sums_T.device))
        summed[-1].sums_T, summed[-1].items_T = sums_T, items_T
    return summed


def widened(mean: Tensor) -> Tensor:
    """At least float32: in bf16 a weight such as 1/3 would be off by 0.2%."""
    return mean.to(torch.promote_types(mean.dtype, torch.float32))


def _wide(device: torch.device) -> torch.dtype:
    # float32 carries whole numbers to 2**24 only, fewer than the tokens of a large window; MPS has nothing wider.
    return torch.float32 if device.type == "mps" else torch.float64
