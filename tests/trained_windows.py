"""Train a Trainer in any order of rows, and compare each window with one batch of the rows that it read."""

from collections.abc import Callable
from itertools import chain
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback

from heads import Row, one_batch, relative_error
from trainers import gradients


class ReadRows(TrainerCallback):
    """A collator that records the numbers of the rows of each batch, from the moment when training begins."""

    def __init__(self, rows: list[Row], collate: Callable[[list[Row]], Any] = one_batch) -> None:
        self._numbers, self._collate = {id(row): n for n, row in enumerate(rows)}, collate
        self._rows = rows  # keeps their ids
        self.batches: list[list[int]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.batches.clear()  # those that were measured

    def __call__(self, rows: list[Row]) -> Any:
        self.batches.append([self._numbers[id(row)] for row in rows])
        return self._collate(rows)

    def windows(self, k: int, n_epochs: int = 1) -> list[list[int]]:
        """Return the rows of each window on all processes, each row once in an epoch: not where it is repeated."""
        n_each, rest = divmod(len(self.batches), n_epochs)
        assert not rest
        starts = [start for epoch in range(n_epochs) for start in range(epoch * n_each, (epoch + 1) * n_each, k)]
        ends = [min(start + k, (start // n_each + 1) * n_each) for start in starts]
        mine = [list(chain(*self.batches[start:end])) for start, end in zip(starts, ends, strict=True)]
        everywhere = gather_object([mine])
        windows: list[list[int]] = []
        seen: set[int] = set()
        for start, parts in zip(starts, zip(*everywhere, strict=True), strict=True):
            seen = seen if start % n_each else set()
            windows.append(sorted(set(chain(*parts)) - seen))
            seen.update(windows[-1])
        return windows


def read_window_errors(
    trainer_class: Any,
    model: nn.Module,
    rows: list[Row],
    *,
    k: int,
    parts: dict[str, Any] | None = None,
    **given: Any,
) -> tuple[list[float], list[float], list[list[int]]]:
    """Return the relative error of each window's gradient, and of its loss, and the numbers of its rows.

    Args:
        given: arguments of `TrainingArguments`.
    """
    read = ReadRows(rows)
    together: dict[str, Any] = {"callbacks": [read], **(parts or {})}
    given |= {"gradient_accumulation_steps": k}
    found, logged = gradients(trainer_class, model, rows, collate=read, parts=together, **given)
    windows = read.windows(k, given.get("num_train_epochs", 1))
    return (*errors_of(found, logged, model, [[rows[n] for n in window] for window in windows]), windows)


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def errors_of(
    found: list[dict[str, Tensor]],
    logged: list[float],
    model: nn.Module,
    windows: list[list[Row]],
    loss: Callable[[nn.Module, Any], Tensor] = own_loss,
) -> tuple[list[float], list[float]]:
    """Return the relative error of each window's gradient, and of its loss, against one batch of its rows."""
    model.train()
    wanted, losses = [], []
    for window in windows:
        model.zero_grad()
        value = loss(model, one_batch(window))
        value.backward()
        losses.append(value.item())
        wanted.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    return (
        [relative_error(f, w) for f, w in zip(found, wanted, strict=True)],
        [abs(a - b) / abs(b) for a, b in zip(logged, losses, strict=True)],
    )


def same_as_one_batch(
    trainer_class: Any, plain_class: Any, make_model: Callable[[], nn.Module], rows: Any, *, size: int, **given: Any
) -> tuple[list[float], list[float]]:
    """Return the errors of windows of `size` rows against the unchanged Trainer with batches of `size` rows."""
    found, logged = gradients(trainer_class, make_model(), rows, **given)
    single = {**given, "per_device_train_batch_size": size, "gradient_accumulation_steps": 1}
    wanted, losses = gradients(plain_class, make_model(), rows, **single)
    return (
        [relative_error(f, w) for f, w in zip(found, wanted, strict=True)],
        [abs(a - b) / abs(b) for a, b in zip(logged, losses, strict=True)],
    )
