"""The agreement of the gradients of two random halves of a window, which shows how much of its gradient is noise.

Let a be the gradient after the first half, g that of the window, and f the share of loss items in the first half. Then
a / f and (g - a) / (1 - f) are the gradients of the halves, and their product, ⟨a, g - a⟩ / (f · (1 - f)), is their
agreement. Both gradients are reduced to 65,536 signed sums, so that neither is copied. Sums are linear: those of
several processes add up, and those of the second half are a difference.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.loader import MicroBatch
from ..objective.normalizer import LossNormalizer
from ..objective.signed_sums import add_signed
from ..runtime.accumulation_backend import AccumulationBackend
from ..runtime.gradients.plain import GradientStrategy
from ..runtime.gradients.sparse import SparseEmbeddingGradients

N_SUMS = 1 << 16  # the relative standard error of a product is 1 / sqrt(65,536) = 0.4%


@dataclass(frozen=True)
class Agreement:
    """The agreement of the two halves of a window.

    Attributes:
        share: the agreement divided by the squared norm of the window's gradient, a scalar on the device. It does not
            depend on the scale of the gradient.
        seconds: the time that this process took to measure it. On a GPU, the time to start its work.
    """

    share: Tensor
    seconds: float


class HalfGradients:
    """A measurement of the agreement while a window is accumulated, if it has halves. Nothing waits for the device."""

    def __init__(
        self,
        accelerator: AccumulationBackend,
        strategy: GradientStrategy,
        embeddings: SparseEmbeddingGradients,
        micro_batches: Sequence[MicroBatch],
        n_first: int | None,
    ) -> None:
        """Begin a measurement.

        Args:
            embeddings: gradients that are not in the `grad` of the strategy's parameters yet.
            micro_batches: this process's micro-batches of the window.
            n_first: the number of them in the first half; None if the window has no halves, and 0 if this process
                cannot measure them, so that the agreement is NaN.
        """
        self._accelerator, self._strategy, self._embeddings = accelerator, strategy, embeddings
        self._micro_batches, self._n_first = micro_batches, n_first
        self._first: Tensor | None = None
        self._seconds = 0.0
        if n_first == 0:
            self._first = self._sums()

    def pass_done(self, index: int) -> None:
        """Reduce the gradient so far to sums, if the pass at this position is the last one of the first half."""
        if index + 1 == self._n_first:
            self._first = self._sums()

    def compare(self, normalizer: LossNormalizer) -> Agreement | None:
        """Return the agreement after the window's gradient is complete, or None if the window has no halves.

        All processes must call this together.
        """
        if (first := self._first) is None:
            return None
        last = self._sums()
        started = time.perf_counter()
        term = normalizer.terms[0]
        items = sum(micro.counts[term] for micro in self._micro_batches[: self._n_first]) if self._n_first else math.nan
        # Filled on the device, because it would wait for a copy from the host.
        numbers = torch.cat([first, first.new_full((1,), items)])
        if (processes := self._accelerator.num_processes) > 1:
            numbers = self._accelerator.reduce(numbers, "sum")
            numbers[:N_SUMS] /= processes  # the gradient is the mean over processes
        first, part = numbers[:N_SUMS], numbers[N_SUMS] / normalizer.items_T[0]
        share = first @ (last - first) / (part * (1 - part)) / (last @ last)
        self._seconds += time.perf_counter() - started
        return Agreement(share, self._seconds)

    def _sums(self) -> Tensor:
        """Return signed sums of this process's gradient so far."""
        started = time.perf_counter()
        device, parameters = self._accelerator.device, self._strategy.parameters
        is_wide = device.type != "mps" and any(p.dtype == torch.float64 for p in parameters)
        sums = torch.zeros(N_SUMS, dtype=torch.float64 if is_wide else torch.float32, device=device)
        position = 0
        for p in parameters:
            for gradient in (p.grad, self._embeddings.sum_so_far(p)):
                if gradient is not None:
                    add_signed(sums, gradient, position)
            position += 2 * p.numel() if p.is_complex() else p.numel()
        self._seconds += time.perf_counter() - started
        return sums
