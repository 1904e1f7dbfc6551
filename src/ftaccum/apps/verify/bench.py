"""Compute the gradients of a window, in one batch and accumulated."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...accumulation.accumulator import GradientAccumulator
from ...data.batches import can_be_taken_apart, take
from ...data.loader import Loader, LocalRows, MicroBatch
from ...errors import DataError
from ...objective.item_counts import Batch, tensors_of
from ...objective.normalizer import gathered
from ...planning.micro_batches import MicroBatchRows, RowIndices
from ...runtime.memory import WindowOutOfMemoryError
from ...runtime.state_guards import preserve_buffers, preserve_rng
from ...training.base_run import Run
from .gradients import WindowGradient, taken
from .precision import cast
from .reference import Reference
from .splits import Split


@dataclass(frozen=True)
class Bench:
    """A model, its rows, and everything else that stays constant while windows are split in different ways.

    Attributes:
        run: the run, with the unwrapped model and the loader of training.
        modules: the model, and a loss over the window whose parameters are trained.
        reference: the loss of one batch, without anything that ftaccum infers.
        padded: the loader of training, with `padding_free` off.
        window: the positions of all rows of a full window.
        seed: the seed for random draws of a collator.
        dtype: the type that the model is converted to; None if it is unchanged.
    """

    run: Run
    modules: Sequence[nn.Module]
    reference: Reference
    padded: Loader
    window: RowIndices
    seed: tuple[int, ...]
    dtype: torch.dtype | None

    def together(self, rows: RowIndices, *, backwards: bool = False, factor: float = 1.0) -> WindowGradient:
        """Return the gradient of all rows in one batch: one forward and one backward pass of the reference.

        Args:
            rows: the positions of the rows.
            backwards: whether to reverse their order.
            factor: a factor of the loss in the backward pass. The gradient is divided by it afterwards.

        Raises:
            torch.OutOfMemoryError: if the rows do not fit in memory together.
        """
        with self.from_the_start():
            batch = self.reference.batch(rows, backwards=backwards, dtype=self.dtype)
            loss = self.reference.loss(batch, backwards=backwards)
            self.backward(loss * factor)
        return WindowGradient(self.taken(factor), loss.item())

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of a loss, unless it depends on no weight, as the loss of a single row may."""
        if loss.requires_grad or not self.reference.over_window:
            (loss * self.scale).backward()

    def taken(self, factor: float = 1.0) -> list[Tensor | None]:
        """Remove the gradients, and return them divided by the scale and a factor of the loss."""
        return taken((p for module in self.modules for p in module.parameters()), factor * self.scale)

    def loss(self) -> float:
        """Return the reference's loss of the full window.

        Raises:
            DataError: if it is NaN, as the mean over no loss items is.
        """
        with torch.no_grad():
            loss = self.reference.loss(self.reference.batch(self.window, dtype=self.dtype)).item()
        if math.isnan(loss):
            raise DataError(
                f"The loss of the {len(self.window)} rows of an update in one batch is {loss}. If none of them counts "
                "in the loss, give another `random_seed`. Otherwise look for values that are not finite."
            )
        return loss

    def settle_scale(self) -> None:
        """Lower the scale of fp16 gradients until they are finite, as training does in its first updates."""
        scaler = self.run.accelerator.scaler
        while scaler is not None and self.scale > 1 and not self.together(self.window).is_finite:
            scaler.scale(torch.zeros((), device=self.run.accelerator.device))  # creates the scale
            scaler.update(self.scale / 2)

    def accumulated(self, accumulator: GradientAccumulator, split: Split) -> WindowGradient:
        """Return the gradient that training would give to the optimizer, on this process.

        Raises:
            torch.OutOfMemoryError: if a micro-batch does not fit in memory together with the gradient of one batch.
        """
        share = self._share(split)
        with self.from_the_start():
            try:
                losses = accumulator.accumulate(share).losses
            except WindowOutOfMemoryError as error:
                reason = f" The device reported: {error.failed.message}" if error.failed else ""
                raise torch.OutOfMemoryError(f"Memory ran out while accumulating '{split.name}'.{reason}") from error
        return WindowGradient(self.taken(), gathered([losses], self.run.accelerator)[0].total())

    def takes(self, split: Split) -> bool:
        """Return whether the model can run on the smallest micro-batches of the split.

        Batch norm, for example, rejects a single row, which a dummy micro-batch has. All processes test this together,
        because an error on one process during accumulation would leave the others waiting.
        """
        if all(len(piece.rows) > 1 for share in split.by_process for piece in share):
            return True
        with self.from_the_start(), torch.no_grad():
            return self.reference.can_run(self.reference.batch(self.window[:1], dtype=self.dtype))

    def whole(self, rows: RowIndices) -> MicroBatch:
        """Return rows in one micro-batch, loaded as in training but padded."""
        return self._loaded(self.padded, rows, [MicroBatchRows.of(rows, tuple(range(len(rows))))])[0]

    def micro_batches(self, split: Split) -> list[MicroBatch]:
        """Return the micro-batches of all processes as in an ordinary training loop: padded, without dummies."""
        loaded = self.padded.stream([LocalRows(split.rows, split.slices, self.seed)])
        return [replace(micro, batch=cast(micro.batch, self.dtype)) for micro in loaded]

    def is_wider(self, split: Split) -> bool:
        """Return whether padding to the width of the window would widen a micro-batch of the split."""
        whole = self.whole(split.rows).batch
        widths, *others = [_widths(batch) for batch in (whole, *(m.batch for m in self.micro_batches(split)))]
        return can_be_taken_apart(whole, len(split.rows)) and any(other != widths for other in others)

    @contextmanager
    def from_the_start(self) -> Iterator[None]:
        """Restore random generators and buffers afterwards, so that all passes start from the same state."""
        with preserve_rng(), preserve_buffers(self.run.model):
            yield

    def _share(self, split: Split) -> list[MicroBatch]:
        share = self._loaded(self.run.data.train, split.rows, split.by_process[self.run.accelerator.process_index])
        if not split.at_one_width:
            return share
        whole = self.whole(split.rows).batch
        place = {position: n for n, position in enumerate(split.rows)}
        return [
            micro if micro.is_dummy else replace(micro, batch=take(whole, [place[p] for p in micro.slice.rows]))
            for micro in share
        ]

    def _loaded(self, loader: Loader, rows: RowIndices, slices: Sequence[MicroBatchRows]) -> list[MicroBatch]:
        (micro_batches,) = loader.load([LocalRows(rows, slices, self.seed)])
        return [replace(micro, batch=cast(micro.batch, self.dtype)) for micro in micro_batches]

    @property
    def scale(self) -> float:
        """The scale of fp16 gradients, by which `taken` divides; 1 in other precisions."""
        scaler = self.run.accelerator.scaler
        return 1.0 if scaler is None else scaler.get_scale()


def _widths(batch: Batch) -> list[torch.Size]:
    return [tensor.shape[1:] for tensor in tensors_of(batch)]
