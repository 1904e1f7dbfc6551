"""Where gradients are made: of a window in one batch, and of the same window accumulated."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...accumulation.accumulator import GradientAccumulator
from ...data.batches import can_be_taken_apart, take
from ...data.loader import Loader, LocalRows, MicroBatch
from ...errors import DataError
from ...objective.batch_changes import fresh_batch
from ...objective.item_counts import Batch, tensors_of
from ...objective.normalizer import gathered
from ...planning.micro_batches import MicroBatchRows, RowIndices
from ...runtime.memory import WindowOutOfMemoryError
from ...runtime.state_guards import preserve_buffers, preserve_rng
from ...training.base_run import Run
from .gradients import WindowGradient, taken
from .precision import cast
from .splits import Split


@dataclass(frozen=True)
class Bench:
    """A model, its rows, and all that is held constant while windows are cut in one way and another.

    Attributes:
        run: has the model, not wrapped, and the loader of training.
        padded: the same loader with rows side by side.
        window: all rows of a full window.
        seed: of what a collator draws.
        dtype: that the model is in; None where it is as it came.
    """

    run: Run
    padded: Loader
    window: RowIndices
    seed: tuple[int, ...]
    dtype: torch.dtype | None

    def together(self, rows: RowIndices, order: RowIndices | None = None, factor: float = 1.0) -> WindowGradient:
        """The gradient of the loss over all rows at once: one forward and one backward pass, and no denominator.

        Args:
            rows: of the window.
            order: the same in another order.
            factor: that the loss is multiplied by before the backward pass, and the gradient divided by after it.

        Raises:
            DataError: where none of the rows has loss items.
            torch.OutOfMemoryError: where they do not fit in memory together.
        """
        micro = self.whole(rows, order)
        if micro.is_dummy:
            raise DataError(f"None of the {len(rows)} rows of a window has loss items. Give another `random_seed`.")
        with self.from_the_start():
            loss = self.loss_of(micro)
            (loss * factor * self.scale).backward()
        return WindowGradient(taken(self.run.model, factor * self.scale), loss.item())

    def settle_scale(self) -> None:
        """Lowers the scale of fp16 gradients until they are finite, as training does in its first updates."""
        scaler = self.run.accelerator.scaler
        while scaler is not None and self.scale > 1 and not self.together(self.window).is_finite:
            scaler.scale(torch.zeros((), device=self.run.accelerator.device))  # makes it one that can be changed
            scaler.update(self.scale / 2)

    def accumulated(self, accumulator: GradientAccumulator, split: Split) -> WindowGradient:
        """The gradient that training leaves for the optimizer, on this process.

        Raises:
            torch.OutOfMemoryError: where a micro-batch does not fit in memory beside the gradient of one batch.
        """
        share = self._share(split)
        with self.from_the_start():
            try:
                losses = accumulator.accumulate(share).losses
            except WindowOutOfMemoryError as error:
                said = f" The device said: {error.failed.message}" if error.failed else ""
                raise torch.OutOfMemoryError(f"Memory ran out while '{split.name}' was accumulated.{said}") from error
        return WindowGradient(taken(self.run.model, self.scale), gathered([losses], self.run.accelerator)[0].total())

    def takes(self, split: Split) -> bool:
        """Whether the model can be run on micro-batches as small as these: batch norm takes no row by itself, as a
        dummy is. (Tried by all processes alike: where one alone fails while accumulating, the others wait for it.)"""
        if all(len(piece.rows) > 1 for share in split.by_process for piece in share):
            return True
        try:
            with self.from_the_start(), torch.no_grad():
                self.loss_of(self.whole(self.window[:1]))
        except ValueError:
            return False
        return True

    def loss_of(self, micro: MicroBatch) -> Tensor:
        """The model's loss of a batch, with its graph."""
        batch = fresh_batch(micro.batch, self.run.accelerator.device)
        means = self.run.data.objective.means(
            self.run.model, batch, micro.counts, micro.terms or self.run.data.objective.terms
        )[0]
        return torch.stack(list(means.values())).sum()

    def whole(self, rows: RowIndices, order: RowIndices | None = None) -> MicroBatch:
        """Rows in one micro-batch."""
        places = tuple(rows.index(position) for position in order or rows)
        return self._loaded(self.padded, rows, [MicroBatchRows.of(rows, places)])[0]

    def micro_batches(self, split: Split) -> list[MicroBatch]:
        """Those of all processes, as anybody would have them: padded, and without dummies."""
        loaded = self.padded.stream([LocalRows(split.rows, split.slices, self.seed)])
        return [replace(micro, batch=cast(micro.batch, self.dtype)) for micro in loaded]

    def is_wider(self, split: Split) -> bool:
        """Whether its micro-batches would be padded further at the width of the window."""
        whole = self.whole(split.rows).batch
        widths, *others = [_widths(batch) for batch in (whole, *(m.batch for m in self.micro_batches(split)))]
        return can_be_taken_apart(whole, len(split.rows)) and any(other != widths for other in others)

    @contextmanager
    def from_the_start(self) -> Iterator[None]:
        """Around passes that shall find, and leave, generators and buffers as all others do."""
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
        """Of fp16 gradients, by which `taken` divides."""
        scaler = self.run.accelerator.scaler
        return 1.0 if scaler is None else scaler.get_scale()


def _widths(batch: Batch) -> list[torch.Size]:
    return [tensor.shape[1:] for tensor in tensors_of(batch)]
