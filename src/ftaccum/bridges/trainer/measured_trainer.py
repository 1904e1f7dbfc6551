"""What a Trainer's loss is a mean over, measured on a few of its rows."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.utils.data import IterableDataset
from transformers import Trainer

from ...data.collator import RowCollator
from ...data.dataset import Rows
from ...data.loader import MicroBatch
from ...data.probe_rows import labelled_positions, sample_of
from ...data.row import as_row, is_row
from ...errors import DataError
from ...objective.item_counts import ItemCounter
from ...objective.loss_scale import find_divisor
from ...objective.objective import Objective
from ...objective.sample import Sample
from ...objective.self_check import measured_objective
from ...objective.warn_inexact import warn_if_inexact
from ...runtime.log import logger
from ...runtime.model_context import run_eagerly, without_autocast
from ...runtime.state_guards import preserve_buffers, preserve_rng
from ...training.build_plan import report_loss_scale
from ...training.declared import counter_of
from ..exact_options import ExactOptions
from ..window_width import padding_of
from .mean_loss import MeanLoss
from .trainer_forward import ComputeLoss, TrainerForward
from .trainer_state import preserved
from .trainer_support import known_as_inexact
from .trainer_words import for_trainers
from .uneven_gather import gathering


class MeasuredTrainer:
    """The measured loss of a Trainer.

    Attributes:
        objective: the loss, and how to count its items.
        dummy: a dummy micro-batch: a row with loss items, at weight 0.
        is_overridden: whether a subclass has its own `compute_loss`.
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
            mean_loss = MeanLoss(trainer, compute_loss, options.count_items)
            forward = TrainerForward(mean_loss, trainer.model)
            mean_loss.find_kind(forward, sample)
            of_count = mean_loss.of_count(forward, sample)
            self.objective = measured_objective(
                trainer.model,
                forward,
                sample,
                item_counter=item_counter_of(trainer, padding_of(model, trainer.compute_loss_func, sample.together)),
                count_items=mean_loss.count_items,
                sums=mean_loss.sums,
            )
            forward.stop_reading_outputs()
            self.is_overridden = getattr(compute_loss, "__func__", None) is not Trainer.compute_loss
            if self.is_overridden or trainer.compute_loss_func is not None or trainer.label_smoother is not None:
                self.objective.report = replace(self.objective.report, own_loss=False)
            divisor = find_divisor(trainer.model, self.objective, sample)
        self._known = [*known_as_inexact(trainer), *([of_count] if of_count else [])]
        self.dummy, self.has_rows = _dummy(sample, self.objective), sample.cut is not None
        report, is_main = self.objective.report, trainer.is_world_process_zero()
        logger.debug(report.describe_measurement())
        warn_if_inexact(report, options.on_inexact, is_main=is_main, known=self._known, rephrase=for_trainers)
        if is_main:
            report_loss_scale(divisor, {trainer.args.gradient_accumulation_steps}, "compute_loss")

    def describe(self) -> str:
        """Return a sentence on the items that the loss is a mean over, and on what is not exact, if anything."""
        report = self.objective.report
        inexact = [*self._known, *report.inexact()]
        return for_trainers(" ".join([f"The loss is a mean over {report.counted_by}.", *inexact]))


def item_counter_of(trainer: Any, fill: Mapping[str, int]) -> ItemCounter:
    """Return the ways to count the items of a Trainer's loss, with the ignored label and the weights that it declares.

    Args:
        fill: the padding of columns.
    """
    return counter_of(trainer.model, trainer.compute_loss_func, fill["labels"])


def sample_of_loader(trainer: Any, loader: Any) -> Sample | None:
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
        ignore_index = padding_of(trainer.model, trainer.compute_loss_func, row_collator(rows, [0]))["labels"]
        labelled = labelled_positions(rows, row_collator, ignore_index)
        return sample_of(rows, row_collator, labelled, ignore_index)


def _dummy(sample: Sample, objective: Objective) -> MicroBatch:
    """Return a row with loss items as a dummy micro-batch; all of them if the model cannot run a single row."""
    groups = [[0, 1, 2, 3]] if objective.report.in_training.complaint is not None else [[n] for n in range(4)]
    for batch in sample.separate(sample.together, groups):
        counts = objective.count(batch)
        if any(counts.values()):
            micro = MicroBatch.of(batch, counts, "a dummy micro-batch")
            return replace(micro, counts=dict.fromkeys(counts, 0))
    raise DataError("No row of `train_dataset` that was checked counts in the loss. Check its labels.")
