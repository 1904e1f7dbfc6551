"""Exact gradient accumulation in a loop that the user wrote."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ...accumulation.accumulator import GradientAccumulator
from ...data.loader import MicroBatch
from ...errors import refuse
from ...objective.item_counts import Batch
from ...objective.normalizer import gathered
from ...planning.audit_schedule import AuditSchedule
from ...runtime.gradients.averaged import AveragedGradients
from ...runtime.loop_accelerator import LoopAccelerator, n_processes
from ...runtime.memory import WindowOutOfMemoryError
from ...runtime.process_group import ProcessGroup, lasting_process_group
from ...runtime.wrapped_models import UnfinishedForward, ddp_around, faults_of_wrappers, inner_model
from ..window_audits import WindowAudits
from ..window_width import at_one_width
from .loop_checks import check_arguments, check_loader, check_window
from .loop_objective import LossArguments, MeasuredLoss, measure_loss
from .loop_windows import windows_of


class ExactAccumulation:
    """Exact gradient accumulation in your own training loop, with Accelerate, DistributedDataParallel or plain PyTorch.

    The gradient of a window of k micro-batches, on all processes, is that of one batch of its rows::

        accumulation = ftaccum.ExactAccumulation(model, accelerator)
        for window in accumulation.windows(loader, k):
            loss = accumulation.backward(window)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    The first `backward` measures on a few rows which items the loss is a mean over. Later ones count these items over
    the whole window, and weight each micro-batch by its share. Processes sync once per window, and may have unequally
    many micro-batches, or none.

    Attributes:
        means: the mean of each term of the last window's loss, over all processes; NaN for a term without items. A loss
            that is one number has the term "loss".
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator | None = None,
        *,
        loss_fn: Callable[[Any, Any], Any] | None = None,
        reduction: str = "mean",
        count_items: Callable[[Any], Any] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        on_inexact: str = "warn",
        audit: bool | int = True,
    ) -> None:
        """Nothing is measured before the first `backward`.

        Args:
            model: the model to train, before or after `accelerator.prepare` or DistributedDataParallel.
            accelerator: the Accelerator of the loop; None for plain PyTorch, on one process or on all processes of
                torch's default process group.
            loss_fn: `loss_fn(outputs, batch)` if batches are dicts, `loss_fn(outputs, targets)` if they are pairs
                (inputs, targets); None for the model's own loss. It returns a number, or a dict of numbers by name,
                which are added up. It does not divide by k.
            reduction: "mean" if the loss is a mean over its items, "sum" if it is a sum.
            count_items: returns the number of loss items of a batch, or a dict of them by name; None to measure how
                they are counted.
            scaler: the gradient scaler of a loop in fp16 without Accelerate. Unscale, step and update as usual.
            on_inexact: what to do if the loss cannot be accumulated exactly: "warn", "error" or "ignore".
            audit: True to compare the gradients of some windows with those of one batch of the same rows, a number to
                do so every so many windows, or False.

        Raises:
            SettingsError: if an argument is invalid, or if the model is sharded, or wrapped in a way that cannot be
                exact.
        """
        check_arguments(
            model,
            accelerator,
            scaler,
            loss_fn=loss_fn,
            reduction=reduction,
            count_items=count_items,
            on_inexact=on_inexact,
            audit=audit,
        )
        self._model, self._accelerator, self._scaler, self._audit = model, accelerator, scaler, audit
        self._loss = LossArguments(loss_fn, reduction, count_items, on_inexact)
        self._measured: MeasuredLoss | None = None
        self._n_windows = 0
        self.means: Mapping[str, float] = {}
        self._unfinished = self._check_wrappers()

    def windows(self, loader: Iterable[Any], k: int) -> Iterator[list[Any]]:
        """Yield the windows of one epoch: lists of up to k batches of this process. The last one may be shorter.

        Leave out rows that Accelerate or torch's DistributedSampler repeat at the end of an epoch. All processes get
        the same number of windows, and a window may be empty on some of them.

        Args:
            loader: a DataLoader, prepared by Accelerate or not, or any other source of batches; each process its own.
            k: the number of micro-batches per update.

        Raises:
            SettingsError: if `loader` or `k` is invalid.
        """
        check_loader(loader, k)
        return windows_of(loader, k, self._process_group)

    def backward(self, window: Sequence[Any]) -> float:
        """Add the gradient of a window's mean loss to `grad` of the model's parameters, on all processes alike.

        As in PyTorch, gradients add up until you set them to None or zero. If an error is raised, they are all None.
        The model runs in the mode that it is in: call `model.train()` first.

        If no row of the window has loss items (all its labels are ignored), gradients stay as they are, and an
        optimizer leaves weights without a gradient unchanged. A gradient scaler needs a gradient: unscale, step and
        update it only `if not math.isnan(loss)`.

        Args:
            window: this process's micro-batches, as `windows` yields. All processes must make the same call.

        Returns:
            The mean loss of the window over all processes; NaN if no row has loss items.

        Raises:
            SettingsError, DataError: on all processes, if the batches of one of them cannot be used.
            InexactLossError: if the loss is not exact and `on_inexact` is "error".
            torch.OutOfMemoryError: on all processes, if memory ran out on one of them.
        """
        batches = self._process_group.run_on_all(lambda: self._checked(window))
        if self._measured is None or self._measured.n_rows == 1:
            self._measure(batches)
        if self._measured is None:
            self.means = {}
            return float("nan")
        micro_batches = self._micro_batches(batches, self._measured)
        try:
            self._n_windows += 1
            self._audits.before_window(micro_batches, self._n_windows)
        except Exception:
            self._accumulator.zero_gradients()
            raise
        return self._accumulate(micro_batches)

    @property
    def audits(self) -> list[dict[str, Any]]:
        """The audits so far, with the keys of `Result.audits`. `error` is the relative error of a gradient."""
        return [] if self._measured is None else list(self._audits.found)

    @property
    def report(self) -> str:
        """A sentence on the items that the loss is a mean over, and on what is not exact, if anything."""
        if self._measured is None:
            return "The loss has not been measured yet. The first `backward` measures it."
        report = self._measured.objective.report
        return " ".join([f"The loss is a mean over {report.counted_by}.", *report.inexact()])

    @cached_property
    def _inner(self) -> nn.Module:
        """The model that runs. DDP would expect its own forward pass, and would average in the last pass alone."""
        self._unfinished = self._check_wrappers(self._unfinished)  # it may have been wrapped since
        return inner_model(self._model)

    @cached_property
    def _process_group(self) -> ProcessGroup:
        return lasting_process_group(n_processes(self._accelerator))

    @cached_property
    def _runner(self) -> LoopAccelerator:
        return LoopAccelerator(self._accelerator, self._scaler, next(self._inner.parameters()).device)

    @cached_property
    def _accumulator(self) -> GradientAccumulator:
        strategy = AveragedGradients(self._inner, *self._known.objective.modules)
        return GradientAccumulator(self._runner, self._inner, self._known.objective, strategy, self._process_group)

    @cached_property
    def _audits(self) -> WindowAudits:
        return WindowAudits(
            self._runner,
            self._inner,
            self._known.objective,
            self._process_group,
            self._known.fill,
            AuditSchedule(self._audit, sys.maxsize),
            self._loss.on_inexact,
            lambda: {**self._known.objective.state, "count_items": self._loss.count_items},
        )

    @property
    def _known(self) -> MeasuredLoss:
        assert self._measured is not None, "measured before the first window"
        return self._measured

    def _check_wrappers(self, watch: UnfinishedForward | None = None) -> UnfinishedForward | None:
        """Refuse wrappers that cannot be exact, and watch the forward passes of DistributedDataParallel."""
        refuse(faults_of_wrappers(self._model, self._accelerator, n_processes(self._accelerator)))
        ddp = ddp_around(self._model, self._accelerator)
        return watch if watch is not None or ddp is None else UnfinishedForward(ddp)

    def _measure(self, batches: Sequence[Batch]) -> None:
        """Measure the loss; measure it again if one row was measured, and this window has more."""
        before, audits = self._measured, self.audits
        needed = 1 if before is None else 2
        found = measure_loss(self._inner, batches, self._loss, self._process_group, needed)
        if found is None:
            return
        self._measured = found
        if before is not None:
            for made in ("_accumulator", "_audits"):  # for the loss as it was measured before
                vars(self).pop(made, None)
            self._audits.found.extend(audits)

    def _checked(self, window: Sequence[Any]) -> list[Batch]:
        if self._unfinished is not None:
            self._unfinished.check()
        return check_window(window)

    def _micro_batches(self, batches: Sequence[Batch], measured: MeasuredLoss) -> list[MicroBatch]:
        """Return the micro-batches that have loss items. No process waits for another one's passes."""
        objective = measured.objective
        if objective.padding_sensitive:
            batches = at_one_width(batches, measured.fill, self._process_group)
        counts = self._process_group.run_on_all(lambda: [objective.count(batch) for batch in batches])
        return [
            MicroBatch.of(batch, n, f"micro-batch {i} of the window")
            for i, (batch, n) in enumerate(zip(batches, counts, strict=True))
            if any(n.values())
        ]

    def _accumulate(self, micro_batches: Sequence[MicroBatch]) -> float:
        """Accumulate the gradient, and return the window's loss."""
        try:
            window = self._accumulator.accumulate(micro_batches)
        except WindowOutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                "Memory ran out in a pass, on this process or another one. Use smaller batches and a larger k, which "
                f"leaves the update unchanged. {'' if error.failed is None else error.failed.message}"
            ) from error
        moved = self._process_group.any_of(bool(flag) for flag in window.moved_buffers.tolist())
        self._accumulator.observe_buffers(moved, undone=False)
        (losses,) = gathered([window.losses], self._runner)
        self._runner.end_window()
        self.means = losses.read()
        return losses.total()
