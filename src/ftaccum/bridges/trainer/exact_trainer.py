"""`exact`: a Trainer whose gradient accumulation is exactly a large batch."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar, overload

import torch
from torch import nn

from ...errors import SettingsError
from ...objective.item_counts import CountItems
from ..exact_options import ExactOptions
from .counted_window import CountedWindow
from .trainer_support import check_overrides, check_trainer, check_trainer_class
from .trainer_windows import TrainerWindows

TrainerClass = TypeVar("TrainerClass", bound=type)

_NOT_HANDED_ON = (
    "`training_step` must call `self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)` once and "
    "backpropagate the loss that it returns. With `exact`, `num_items_in_batch` holds the counts that weight the loss. "
    "Leave `training_step` to Trainer, or call `super().training_step(model, inputs, num_items_in_batch)` in it."
)
_CHANGED = (
    "`training_step` changes the loss that `compute_loss` returned. With `exact`, this loss is weighted already: a "
    "division by the accumulation steps, for example, would make the gradient too small. Backpropagate it and return "
    "it as it is. Scale the loss of every micro-batch in `compute_loss` of the class that you give to `exact`."
)


@overload
def exact(
    trainer_class: TrainerClass,
    *,
    planner: bool = False,
    count_items: CountItems | None = None,
    on_inexact: str = "warn",
    audit: bool | int = True,
) -> TrainerClass: ...


@overload
def exact(
    *,
    planner: bool = False,
    count_items: CountItems | None = None,
    on_inexact: str = "warn",
    audit: bool | int = True,
) -> Callable[[TrainerClass], TrainerClass]: ...


def exact(
    trainer_class: Any = None,
    *,
    planner: bool = False,
    count_items: CountItems | None = None,
    on_inexact: str = "warn",
    audit: bool | int = True,
) -> Any:
    """Return a Trainer class whose gradient accumulation is exactly a large batch. Everything else stays as it is.

    Before training, the trainer measures what its loss is a mean over. For each window, it counts the loss items on all
    processes, and weights each micro-batch by its share of them. Rows that are repeated so that all processes have
    equally many get no weight.

    Args:
        trainer_class: `Trainer` or a subclass, such as `Seq2SeqTrainer` or TRL's SFT, DPO, Reward, KTO and ORPO
            trainers. Leave it out to use `exact` with options as a decorator.
        planner: cut each window again into the same number of micro-batches, of rows of similar length. The rows of an
            update stay the same, with less padding.
        count_items: returns the number of items that the loss of a batch is a mean over, or a dict of them by term;
            None to measure it.
        on_inexact: "warn", "error" or "ignore": the reaction if accumulating this loss only approximates one batch.
        audit: True to compare the gradients of some updates with those of one batch, a number to do so every so many
            updates, or False.

    Raises:
        SettingsError: if the class cannot be made exact, or an option has a wrong value.

    Example:
        >>> trainer = ftaccum.exact(Trainer)(model=model, args=args, train_dataset=rows)
        >>> trainer.train()

        >>> @ftaccum.exact(planner=True)
        ... class MyTrainer(Trainer): ...
    """
    options = ExactOptions(planner, count_items, on_inexact, audit)
    if trainer_class is None:
        return partial(_exact_class, options=options)
    return _exact_class(trainer_class, options=options)


def _exact_class(trainer_class: Any, *, options: ExactOptions) -> Any:
    check_trainer_class(trainer_class)
    if issubclass(trainer_class, ExactTrainer):
        raise SettingsError([f"{trainer_class.__name__} is exact already. Call `exact` once."])
    members = {name: getattr(trainer_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    members |= {"exact_options": options, "__signature__": inspect.signature(trainer_class)}
    return type(trainer_class.__name__, (ExactTrainer, trainer_class), members)


class ExactTrainer:
    """The hooks that make the windows of a Trainer exact. `exact` puts them before the Trainer's own.

    Attributes:
        exact_options: the options given to `exact`.
    """

    exact_options = ExactOptions()
    _windows: TrainerWindows | None = None

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "exact_options" not in vars(cls):  # a subclass of the class that `exact` returned
            check_overrides(cls, ExactTrainer)

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        check_trainer(self)

    @property
    def exact_audits(self) -> list[dict[str, Any]]:
        """The audits of the last training run, with the keys of `Result.audits`: `error` is the relative error of an
        update's gradient. Empty if the rows of a batch are not those of the data set, as with pairs of preferences."""
        return [] if self._windows is None else list(self._windows.audits)

    @property
    def exact_report(self) -> str:
        """A sentence on the items that the loss is a mean over, and on what is not exact, if anything."""
        return "The loss has not been measured yet." if self._windows is None else self._windows.report

    def get_train_dataloader(self: Any) -> Any:
        """Return this process's batches, without repeated rows. Before training, measure the loss."""
        loader = super().get_train_dataloader()  # type: ignore[misc]
        if self.is_in_train:
            self.loss_is_scaled_for_ga = True  # whatever the constructor of a subclass set
            self._windows = TrainerWindows(self, super().compute_loss, loader, self._windows)  # type: ignore[misc]
        return loader

    def get_batch_samples(self: Any, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Return the micro-batches of a window and, instead of their `num_items_in_batch`, their counts."""
        batches = self._windows.watch(epoch_iterator)
        batches, _ = super().get_batch_samples(batches, num_batches, device)  # type: ignore[misc]
        return self._windows.count(batches, num_batches)

    def training_step(self: Any, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run a forward and backward pass.

        Raises:
            RuntimeError: if the Trainer does not use the weighted loss.
        """
        if not isinstance(num_items_in_batch, CountedWindow):
            raise RuntimeError(_NOT_HANDED_ON)
        n_left = num_items_in_batch.n_left
        with self._windows.one_pass(model, num_items_in_batch):
            loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if num_items_in_batch.n_left != n_left - 1:
            raise RuntimeError(_NOT_HANDED_ON)
        if self._windows.is_changed(loss):
            raise RuntimeError(_CHANGED)
        if not num_items_in_batch.n_left and num_items_in_batch.is_empty and self.accelerator.scaler is None:
            model.zero_grad()  # without a gradient, the optimizer does not change the weights
        return loss

    def compute_loss(
        self: Any, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return a micro-batch's part of the window's loss in training; else the loss that the Trainer returns."""
        if isinstance(num_items_in_batch, CountedWindow):
            loss, outputs = self._windows.loss(model, inputs, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
        if self._windows is not None and self._windows.in_pass:
            raise RuntimeError(_NOT_HANDED_ON)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
