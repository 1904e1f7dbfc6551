"""The windows of a Trainer: read, counted before their first pass, and weighted."""

import math
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from ...accumulation.dummies import leaving_no_trace
from ...data.loader import MicroBatch
from ...errors import DataError
from ...objective.batch_changes import fresh_batch
from ...objective.item_counts import Batch, rows_of
from ...planning.audit_schedule import AuditSchedule
from ...runtime.log import logger
from ...runtime.loop_accelerator import LoopAccelerator
from ...runtime.process_group import lasting_process_group
from ..measured_batches import sample_of_window
from ..window_audits import WindowAudits
from ..window_width import at_one_width, padding_of
from .counted_window import CountedWindow
from .measured_trainer import MeasuredTrainer, item_counter_of, sample_of_loader
from .planned_batches import PlannedBatches, pads_to_longest, plan_batches, row_lengths
from .repeated_rows import RepeatedRows
from .shared_order import share_order
from .trainer_forward import ComputeLoss
from .trainer_state import names_read_by, preserved, state_of
from .uneven_gather import gather_uneven, gathering

_WITHOUT_OWN_STEP = ("transformers.trainer", "ftaccum.bridges.trainer.exact_trainer")


class TrainerWindows:
    """The windows of one training run of a Trainer."""

    def __init__(self, trainer: Any, compute_loss: ComputeLoss, loader: Any, before: "TrainerWindows | None") -> None:
        """Create the windows of a loader, and measure the loss on its rows.

        Args:
            compute_loss: the Trainer's own method, without weights.
            before: the windows of an earlier run of the Trainer. Its measurement is used again if model and rows are
                the same.
        """
        self._trainer, self._accelerator, self._compute_loss = trainer, trainer.accelerator, compute_loss
        share_order(loader, trainer.args.seed if trainer.args.data_seed is None else trainer.args.data_seed)
        self._repeated = RepeatedRows(loader, trainer.accelerator, _planned(trainer, loader))
        self._process_group = lasting_process_group(trainer.accelerator.num_processes)
        self.in_pass = False  # whether a forward and backward pass of a window is running
        self._measured_on = (
            trainer.model, trainer.train_dataset, trainer.data_collator, trainer.compute_loss_func,
            trainer.label_smoother,
        )  # fmt: skip
        self._measured: MeasuredTrainer | None = None
        self._audits: WindowAudits | None = None
        self._audited_state: Any = None  # the Trainer has a new state in each run
        if before is not None and all(map(operator.is_, before._measured_on, self._measured_on)):
            self._measured = before._measured
            self._audits, self._audited_state = before._audits, before._audited_state
        elif (sample := sample_of_loader(trainer, loader)) is not None:
            self._measured = MeasuredTrainer(trainer, compute_loss, sample)
        self._batch_size = getattr(loader, "batch_size", None)
        self._has_own_step = any(
            "training_step" in vars(each) and each.__module__ not in _WITHOUT_OWN_STEP for each in type(trainer).__mro__
        )
        self._loss: Tensor | None = None

    @property
    def measured(self) -> MeasuredTrainer:
        """The measured loss. That of a stream is measured on its first window."""
        assert self._measured is not None, "`count` measures it"
        return self._measured

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches of an epoch."""
        return self._repeated.watch(batches)

    def count(self, batches: Sequence[Batch], n_batches: int) -> tuple[list[Batch], CountedWindow | None]:
        """Return the micro-batches of a window, and their counts.

        A dummy replaces each micro-batch without rows or loss items. If a stream ends within a window, dummies fill it:
        the Trainer would wait for the next epoch to take its step.

        Args:
            batches: the batches that were read.
            n_batches: the number of micro-batches in the window.
        """
        if not batches:
            return [], None
        distinct = self._repeated.leave_out(batches)
        if self._measured is None:
            self._measured = self._measured_on_window([batch for batch in distinct if batch is not None])
        wide = self._at_one_width(distinct)
        found = self._process_group.run_on_all(lambda: [self._micro_batch(batch) for batch in wide])
        found += [self.measured.dummy] * (n_batches - len(found))
        # The last pass syncs the gradients, so it should use as many weights as possible.
        found.sort(key=lambda micro: (not micro.is_dummy, len(micro.terms)))
        self._audit(found)
        terms = self.measured.objective.terms
        window = CountedWindow(found, terms, self._accelerator, is_uneven=self._repeated.is_uneven)
        # A step may change its inputs, and the dummy comes again.
        return [fresh_batch(m.batch, self._accelerator.device) if m.is_dummy else m.batch for m in found], window

    def _audit(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Audit a window if it is due, and if the rows of its batches are those of the data set.

        On several processes, do not audit a loss of the user's own. It may communicate with the other processes, which
        do not run the same passes in an audit.
        """
        state = self._trainer.state
        if reason := self._not_audited():
            if state.global_step == 0:
                logger.info(f"No update is audited: {reason}.")
            return
        if self._audits is None or self._audited_state is not state:
            self._audits, self._audited_state = self._new_audits(), state
        self._audits.before_window(micro_batches, state.global_step + 1, int(state.epoch or 0))

    @contextmanager
    def _unnoticed(self) -> Iterator[None]:
        """Hide passes from the Trainer's own metrics, and let each process run its own."""
        with preserved(self._trainer), gathering(self._accelerator, lambda found: found):
            yield

    def _not_audited(self) -> str | None:
        if not self.measured.has_rows:
            return "batches cannot be split into the rows of the data set, as with pairs of preferences"
        if self.measured.is_overridden and not self._process_group.is_single:
            return "`compute_loss` is overridden, and may communicate with the other processes"
        return None

    def _new_audits(self) -> WindowAudits:
        trainer, options = self._trainer, self._trainer.exact_options
        names = names_read_by(self._compute_loss, trainer)
        function = getattr(
            self._compute_loss, "__func__", None
        )  # without its trainer, whose state changes all the time
        audits = WindowAudits(
            LoopAccelerator(self._accelerator, None, self._accelerator.device),
            trainer.model,
            self.measured.objective,
            self._process_group,
            padding_of(trainer.model, trainer.compute_loss_func, self.measured.dummy.batch),
            AuditSchedule(options.audit, trainer.state.max_steps),
            options.on_inexact,
            lambda: {**state_of(trainer, names), "compute_loss": function},
        )
        audits.during = self._unnoticed
        return audits

    @property
    def audits(self) -> list[dict[str, Any]]:
        """The audits so far, with the keys of `Result.audits`."""
        return [] if self._audits is None else self._audits.found

    @contextmanager
    def one_pass(self, model: nn.Module, window: CountedWindow) -> Iterator[None]:
        """Surround the forward and backward pass of the window's next micro-batch."""
        uneven = gathering(self._accelerator, gather_uneven) if window.is_uneven else nullcontext()
        self.in_pass = True
        try:
            with uneven, leaving_no_trace(window.coming, model, self.measured.objective):
                yield
        finally:
            self.in_pass = False

    def loss(self, model: nn.Module, inputs: Batch, window: CountedWindow) -> tuple[Tensor, Any]:
        """Run the forward pass of the window's next micro-batch; return its part of the loss, and the outputs."""
        micro, objective = window.next(), self.measured.objective
        self._check_counts(micro, inputs)
        means, outputs = objective.means(model, inputs, micro.counts, micro.terms, micro.names)
        contribution = window.normalizer.contribution(means, micro.counts)
        self._loss = window.normalizer.for_backward(contribution)
        return self._loss, outputs

    def is_changed(self, loss: Tensor) -> bool:
        """Return whether a step returns another loss than it got. Waits for the device only if a subclass has it."""
        mine, self._loss = self._loss, None
        return self._has_own_step and mine is not None and not bool(((loss == mine) | (loss != loss)).all())

    @property
    def report(self) -> str:
        """A sentence on the items that the loss is a mean over, and on what is not exact, if anything."""
        if self._measured is None:
            return "The loss of a stream is measured on its first window."
        return self._measured.describe()

    def _check_counts(self, micro: MicroBatch, inputs: Batch) -> None:
        """Raise DataError if `training_step` has changed the inputs since their loss items were counted."""
        if micro.is_dummy or not self._has_own_step:  # only a step of its own can have changed them
            return
        counts = self.measured.objective.count(inputs)
        if any(not math.isclose(counts[term], n) for term, n in micro.counts.items()):
            raise DataError(
                f"`training_step` of {type(self._trainer).__name__} changes a micro-batch after its loss items were "
                f"counted: {dict(micro.counts)} were counted, but it passes {dict(counts)} to `compute_loss`. Make the "
                "change in the data or in `data_collator`."
            )

    def _micro_batch(self, batch: Batch | None) -> MicroBatch:
        counts = None if batch is None else self.measured.objective.count(batch)
        if counts is None or not any(counts.values()):
            return self.measured.dummy
        return MicroBatch.of(batch, counts, "this micro-batch")

    def _at_one_width(self, batches: Sequence[Batch | None]) -> Sequence[Batch | None]:
        """Return the batches as wide as the widest of the window on any process, if padding changes the loss."""
        if not self.measured.objective.padding_sensitive:
            return batches
        fill = padding_of(self._trainer.model, self._trainer.compute_loss_func, self.measured.dummy.batch)
        wide = iter(at_one_width([batch for batch in batches if batch is not None], fill, self._process_group))
        return [None if batch is None else next(wide) for batch in batches]

    def _measured_on_window(self, batches: Sequence[Batch]) -> MeasuredTrainer:
        """Measure the loss of a stream on its first window."""
        trainer = self._trainer
        known = padding_of(trainer.model, trainer.compute_loss_func, batches[0]) if batches else None
        fill = next(each for each in self._process_group.gather(known) if each is not None)
        item_counter = item_counter_of(trainer, fill)
        self._process_group.run_on_all(lambda: self._check_rows(batches))
        sample = sample_of_window(batches, item_counter, fill["input_ids"], self._process_group)
        if sample is None:
            raise DataError(
                "No row of the first window of `train_dataset` has a label that counts: all are "
                f"{item_counter.ignore_index}, which the loss ignores. Check how the labels were made."
            )
        return MeasuredTrainer(self._trainer, self._compute_loss, sample)

    def _check_rows(self, batches: Sequence[Batch]) -> None:
        most = self._batch_size
        if isinstance(most, int) and any(rows_of(batch) > most for batch in batches):
            raise DataError(
                "The rows of the batches are not those of `train_dataset`, as with pairs of preferences, so that their "
                "loss cannot be measured on a stream. Give a data set with a length instead of a stream."
            )


def _planned(trainer: Any, loader: Any) -> PlannedBatches | None:
    """Have a loader read planned batches if `planner` is True, and return their sampler."""
    if not trainer.exact_options.planner:
        return None
    lengths = row_lengths(trainer.train_dataset, trainer.args.length_column_name)
    if lengths is not None and not pads_to_longest(loader, lengths):
        lengths = None
    return plan_batches(loader, lengths, trainer.args.gradient_accumulation_steps)
