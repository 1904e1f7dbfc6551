"""The mean loss of one batch, as a Trainer computes it."""

import math
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ...errors import DataError, SettingsError
from ...objective.batch_changes import fresh_batch
from ...objective.item_counts import IGNORE_INDEX, Batch, CountItems, ItemCounter, relabelled
from ...objective.sample import Sample
from ...runtime.state_guards import inspection_mode
from ...runtime.temporary_attribute import temporary_attribute
from .trainer_forward import ComputeLoss, TrainerForward

_SAME = 1e-4  # relative difference of losses that count as equal


class MeanLoss:
    """The mean loss of a batch, as a Trainer's `compute_loss` returns it if it is given no count for a window.

    Attributes:
        sums: whether it is a sum instead, because `compute_loss_func` always divides by the count, which is then 1.
        count_items: how to count the items of such a sum, or the user's `count_items`.
    """

    def __init__(self, trainer: Any, compute_loss: ComputeLoss, count_items: CountItems | None) -> None:
        self._trainer, self._compute_loss = trainer, compute_loss
        self.sums, self.count_items = False, count_items
        self._count: Any = None

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        with self._trainer.compute_loss_context_manager():
            if self._count is not None:
                return self._compute_loss(model, batch, num_items_in_batch=self._count)
            if not self.sums:
                return self._compute_loss(model, batch)
            loss = self._compute_loss(model, batch, num_items_in_batch=torch.ones((), device=self._trainer.args.device))
        # Trainer multiplies by the number of processes, because DDP averages.
        processes = self._trainer.accelerator.num_processes
        return loss / (processes if self._trainer.args.average_tokens_across_devices else 1)

    def find_kind(self, forward: TrainerForward, sample: Sample) -> None:
        """Find out whether the loss can be computed without a count for a window.

        Raises:
            SettingsError: if `compute_loss` of a subclass needs one.
        """
        trainer = self._trainer
        try:
            self._loss_of(forward, sample)
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

    def of_count(self, forward: TrainerForward, sample: Sample) -> str | None:
        """Return a warning if the loss of a batch is another one with the batch's own count than without a count."""
        trainer = self._trainer
        count = Trainer.get_batch_samples(trainer, iter([sample.together]), 1, trainer.args.device)[1]
        if self.sums or count is None or trainer.accelerator.num_processes > 1:
            return None
        without = self._loss_of(forward, sample)
        with temporary_attribute(self, "_count", count):
            with_count = self._loss_of(forward, sample)
        if math.isclose(without, with_count, rel_tol=_SAME, abs_tol=_SAME):
            return None
        return (
            f"With `num_items_in_batch` of a batch, its loss is {with_count:.4g}, but with None it is {without:.4g}. "
            "`exact` asks for the loss of each micro-batch with None, and weights it. Return the mean over the "
            "micro-batch then."
        )

    def _loss_of(self, forward: TrainerForward, sample: Sample) -> float:
        trainer = self._trainer
        with inspection_mode(trainer.model):
            means, _ = forward(trainer.model, fresh_batch(sample.together, trainer.args.device))
        return sum(mean.item() for mean in means.values())

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
