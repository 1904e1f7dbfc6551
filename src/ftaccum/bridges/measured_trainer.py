"""What a Trainer's loss is a mean over, measured on a few of its rows."""

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer

from ..data.collator import RowCollator
from ..data.dataset import Rows
from ..data.loader import MicroBatch
from ..data.probe_rows import labelled_positions, sample_of
from ..data.row import as_row, is_row
from ..errors import DataError, SettingsError
from ..objective.batch_changes import fresh_batch
from ..objective.item_counts import IGNORE_INDEX, Batch, CountItems, ItemCounter, relabelled
from ..objective.loss_scale import find_divisor
from ..objective.objective import Objective
from ..objective.sample import Sample
from ..objective.self_check import measured_objective
from ..objective.warn_inexact import warn_if_inexact
from ..planning.micro_batches import MicroBatchRows
from ..runtime.log import logger
from ..runtime.model_context import run_eagerly, without_autocast
from ..runtime.state_guards import preserve_buffers, preserve_rng
from ..training.build_plan import report_loss_scale
from .exact_options import ExactOptions
from .trainer_forward import ComputeLoss, TrainerForward
from .trainer_support import known_as_inexact
from .uneven_gather import gathering


class MeasuredTrainer:
    """The measured loss of a Trainer.

    Attributes:
        objective: the loss, and how to count its items.
        dummy: a dummy micro-batch: a row with loss items, at weight 0.
        has_rows: whether the tensors of a batch have the rows of the data set along their first dimension.
    """

    def __init__(self, trainer: Any, compute_loss: ComputeLoss, sample: Sample) -> None:
        """Measure the loss. All processes must make the same call.

        Args:
            compute_loss: the Trainer's own method, without weights.
            sample: the rows to measure it on.

        Raises:
            InexactLossError: if accumulating it is not exact, and `on_inexact` is "error".
        """
        options: ExactOptions = trainer.exact_options
        model = trainer.model
        with (
            preserved(trainer), gathering(trainer.accelerator, lambda found: found), without_autocast(model),
            run_eagerly(model), preserve_rng(), preserve_buffers(model),
        ):  # fmt: skip
            mean_loss = _MeanLoss(trainer, compute_loss, options.count_items)
            forward = TrainerForward(mean_loss, trainer.model)
            mean_loss.settle(sample)
            self.objective = measured_objective(
                trainer.model,
                forward,
                sample,
                item_counter=ItemCounter(IGNORE_INDEX),
                count_items=mean_loss.count_items,
                sums=mean_loss.sums,
            )
            forward.settle()
            if _computes_its_own(trainer, compute_loss):
                self.objective.report = replace(self.objective.report, own_loss=False)
            divisor = find_divisor(trainer.model, self.objective, sample)
        self.dummy, self.has_rows = _dummy(sample, self.objective), sample.cut is not None
        report, is_main = self.objective.report, trainer.is_world_process_zero()
        logger.debug(report.describe_measurement())
        warn_if_inexact(report, options.on_inexact, is_main=is_main, known=known_as_inexact(trainer))
        if is_main:
            report_loss_scale(divisor, {trainer.args.gradient_accumulation_steps})


def sample_of_loader(loader: Any) -> Sample | None:
    """Return rows to measure a loss on, from the data set of a loader.

    Return None if it is a stream, or if its items are no rows before they are collated.

    Raises:
        DataError: if no row has a label that counts.
    """
    source: Any = getattr(loader, "dataset", None)
    if isinstance(source, IterableDataset) or not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        return None
    with preserve_rng():
        if not len(source) or not is_row(as_row(source[0])):
            return None
        rows, row_collator = Rows("train_dataset", source), RowCollator(loader.collate_fn)
        row_collator.find_draws(rows)
        labelled = labelled_positions(rows, row_collator, IGNORE_INDEX)
        return sample_of(rows, row_collator, labelled, IGNORE_INDEX)


class _MeanLoss:
    """The mean loss of a batch, as a Trainer's `compute_loss` returns it if it is given no count for a window.

    Attributes:
        sums: whether it is a sum instead, because `compute_loss_func` always divides by the count, which is then 1.
        count_items: how to count the items of such a sum, or the user's `count_items`.
    """

    def __init__(self, trainer: Any, compute_loss: ComputeLoss, count_items: CountItems | None) -> None:
        self._trainer, self._compute_loss = trainer, compute_loss
        self.sums, self.count_items = False, count_items

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        with self._trainer.compute_loss_context_manager():
            if not self.sums:
                return self._compute_loss(model, batch)
            loss = self._compute_loss(model, batch, num_items_in_batch=torch.ones((), device=self._trainer.args.device))
        # Trainer multiplies by the number of processes, because DDP averages.
        processes = self._trainer.accelerator.num_processes
        return loss / (processes if self._trainer.args.average_tokens_across_devices else 1)

    def settle(self, sample: Sample) -> None:
        """Find out whether the loss can be computed without a count for a window.

        Raises:
            SettingsError: if `compute_loss` of a subclass needs one.
        """
        trainer = self._trainer
        try:
            with torch.no_grad():
                self(trainer.model, dict(fresh_batch(sample.together, trainer.args.device)))
        except (AttributeError, TypeError) as error:  # it divides by None, or calls a method of it
            if isinstance(error, AttributeError) and "NoneType" not in str(error):
                raise
            if trainer.compute_loss_func is None:
                raise SettingsError(
                    [
                        f"`compute_loss` of {type(trainer).__name__} cannot be called without `num_items_in_batch`: "
                        f"{error!r}. If that is None, return the mean over the micro-batch: `exact` weights it."
                    ]
                ) from error
            self.sums = True
            self.count_items = self.count_items or self._counts_of_trainer(sample.together)

    def _counts_of_trainer(self, batch: Batch) -> CountItems:
        """Return the way to count labels that the Trainer uses for `num_items_in_batch`."""
        batch = relabelled(batch, IGNORE_INDEX) or batch
        _, wanted = Trainer.get_batch_samples(self._trainer, iter([batch]), 1, self._trainer.args.device)
        for count in ItemCounter().applicable(batch).values() if wanted is not None else ():
            if count(batch) == wanted:
                return count
        raise DataError(
            "`compute_loss_func` divides by `num_items_in_batch`, but it is unknown which items that counts. "
            "Give `exact` a `count_items`: a function that returns the number of items of a batch."
        )


def _dummy(sample: Sample, objective: Objective) -> MicroBatch:
    """Return a row with loss items as a dummy micro-batch; all of them if the model cannot run a single row."""
    groups = [[0, 1, 2, 3]] if objective.report.in_training.complaint is not None else [[n] for n in range(4)]
    for batch in sample.separate(sample.together, groups):
        counts = objective.count(batch)
        if any(counts.values()):
            terms = tuple(term for term, n in counts.items() if n)
            return MicroBatch(batch, dict.fromkeys(counts, 0), terms, MicroBatchRows(), 0, 0, "a dummy micro-batch")
    raise DataError("No row of `train_dataset` that was checked counts in the loss. Check its labels.")


def _computes_its_own(trainer: Any, compute_loss: ComputeLoss) -> bool:
    """Return whether the loss is not the one that the model returns."""
    is_overridden = getattr(compute_loss, "__func__", None) is not Trainer.compute_loss
    return is_overridden or trainer.compute_loss_func is not None or trainer.label_smoother is not None


@contextmanager
def preserved(trainer: Any) -> Iterator[None]:
    """Restore the plain attributes of a trainer on exit, such as its own metrics, and silence its `log`."""
    before = {name: copy.deepcopy(value) for name, value in vars(trainer).items() if _is_plain(value)}
    trainer.log = lambda *_, **__: None
    try:
        yield
    finally:
        del trainer.log
        vars(trainer).update(before)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return type(value).__module__ in ("builtins", "collections") and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | deque):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
