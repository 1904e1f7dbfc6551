"""The denominator of the loss.

The gradient of a window is ∇ Σ ℓ(item) / N, where N is the number of its loss items on all processes. A micro-batch
yields a mean over its own n items, so its part of the window's loss is mean × n / N. Only this file scales a loss for
accumulation: Accelerate and DDP divide it later, so this file multiplies it by the same factors first.

A loss may have several terms, each a mean over its own kind of items. Each term has its own n and N.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..runtime.accumulation_backend import AccumulationBackend

Counts = Mapping[str, float]  # loss items by term; whole numbers, unless the count adds up weights
Means = Mapping[str, Tensor]  # mean loss by term, each a scalar


class LossNormalizer:
    """The number N of loss items in one window, counted over all processes before its first forward pass."""

    def __init__(
        self,
        counts: Sequence[Counts],
        terms: Sequence[str],
        accelerator: AccumulationBackend,
        factor: float = 1.0,
        *,
        n_divided_by: int | None = None,
    ) -> None:
        """Sum the items of this process's micro-batches, then those of all processes.

        On several processes, N stays on the device, so that the host does not wait for it.

        Args:
            factor: the factor to multiply the window's gradient by.
            n_divided_by: the number that Accelerate divides a loss by; None for the number of micro-batches.
        """
        self._factor = factor
        self.terms = tuple(terms)
        self._n_divided_by = len(counts) if n_divided_by is None else n_divided_by
        self._processes = accelerator.num_processes
        mine = [sum(each[term] for each in counts) for term in terms]
        self.items_T = torch.tensor(mine, dtype=widest_float(accelerator.device))
        if self._processes > 1:
            self.items_T = accelerator.reduce(self.items_T.to(accelerator.device), "sum")

    def contribution(self, means: Means, counts: Counts) -> Tensor:
        """Return a micro-batch's part of the window's loss: Σ over terms of mean × n / N.

        The contributions of all micro-batches of a window, on all processes, add up to its loss.

        Args:
            means: the mean of each term. Leave out a mean over no items, which would be NaN.
            counts: n by term. It is 0 for a dummy micro-batch, which contributes exactly 0, with a gradient of zeros.
        """
        return weighted_sum(means, counts, dict(zip(self.terms, self.items_T, strict=True)))

    def for_backward(self, contribution: Tensor) -> Tensor:
        """Return the contribution times `factor` and times the numbers that it is divided by later.

        Accelerate divides by its number of accumulation steps, and DDP averages over processes.
        """
        return contribution * (self._n_divided_by * self._processes * self._factor)


class WeightedMeans:
    """Running means over loss items, kept as (sum, count) pairs."""

    def __init__(self, terms: Sequence[str], device: torch.device) -> None:
        self.terms = tuple(terms)
        self.sums_T = torch.zeros(len(terms), dtype=widest_float(device), device=device)
        self.items_T = torch.zeros_like(self.sums_T)

    def add(self, means: Means, counts: Counts) -> None:
        """Add a micro-batch of this process without waiting for the device."""
        for t, term in enumerate(self.terms):
            if counts[term]:
                self.sums_T[t] += widened(means[term].detach()) * counts[term]
                self.items_T[t] += counts[term]

    def merge(self, other: "WeightedMeans") -> None:
        self.sums_T += other.sums_T
        self.items_T += other.items_T

    def read(self) -> dict[str, float]:
        """Return the mean of each term; NaN for a term without items."""
        return {term: s / n if n else float("nan") for term, (s, n) in zip(self.terms, self._pairs(), strict=True)}

    def total(self) -> float:
        """Return the loss that is trained on: the sum of the means of all terms with items.

        It is NaN if no term has items, or if a mean is NaN.
        """
        known = [s / n for s, n in self._pairs() if n]
        return sum(known) if known else float("nan")

    def _pairs(self) -> list[tuple[float, float]]:
        return list(zip(self.sums_T.tolist(), self.items_T.tolist(), strict=True))


def weighted_sum(means: Means, counts: Counts, items: Mapping[str, float | Tensor]) -> Tensor:
    """Return Σ over terms of mean × n / N, with n from `counts` and N from `items`."""
    parts = [widened(mean) * (counts[term] / items[term] if counts[term] else 0.0) for term, mean in means.items()]
    return torch.stack(parts).sum()


def means_of_sums(sums: Means, counts: Counts) -> dict[str, Tensor]:
    """Divide a loss that is given as a sum Σℓ by the batch's items; a term without items stays 0."""
    return {term: widened(found) / (counts[term] or 1) for term, found in sums.items()}


def gathered(means: Sequence[WeightedMeans], accelerator: AccumulationBackend) -> list[WeightedMeans]:
    """Sum each of `means` over all processes and copy it to the host, with a single collective and a single wait."""
    return [summed for summed, _ in gathered_with(means, [()] * len(means), accelerator)]


def gathered_with(
    means: Sequence[WeightedMeans], numbers: Sequence[Sequence[int]], accelerator: AccumulationBackend
) -> list[tuple[WeightedMeans, list[int]]]:
    """Do the same as `gathered`, and sum whole numbers of the host over all processes in the same collective.

    Args:
        numbers: as many numbers for each of `means`.
    """
    if not means:
        return []
    n_terms = len(means[0].terms)
    table_MC = torch.stack([torch.cat([m.sums_T, m.items_T]) for m in means])
    if accelerator.num_processes > 1:
        numbers_MN = torch.tensor(numbers, dtype=table_MC.dtype).to(table_MC.device)
        table_MC = accelerator.reduce(torch.cat([table_MC, numbers_MN], dim=1), "sum")
    summed = []
    for row_C, mine in zip(table_MC.cpu(), numbers, strict=True):
        total = WeightedMeans(means[0].terms, row_C.device)
        total.sums_T, total.items_T = row_C[:n_terms], row_C[n_terms : 2 * n_terms]
        others = row_C[2 * n_terms :].tolist() if accelerator.num_processes > 1 else mine
        summed.append((total, [int(number) for number in others]))
    return summed


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in at least float32: in bf16, a weight such as 1/3 would be off by 0.2%."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def widest_float(device: torch.device) -> torch.dtype:
    """Return the type for sums over many numbers: float64, or float32 on devices without it."""
    # float32 is exact for whole numbers up to 2**24, fewer than the tokens of a large window. MPS has no wider type.
    return torch.float32 if device.type == "mps" else torch.float64
