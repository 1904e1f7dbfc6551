"""Run `test_fine_tuning` on fixed weights and compare every window's gradient with one batch in plain PyTorch."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ftaccum import plan, test_fine_tuning
from heads import RecordingOptimizer, Row, one_batch_gradient, relative_error


def window_errors(model: nn.Module, rows: Sequence[Row], *, num_processes: int = 1, **arguments: Any) -> list[float]:
    """Return the relative gradient error of each window on this process.

    A weight that no row of a window uses must have no gradient at all, rather than one of zeros.

    Args:
        arguments: of `test_fine_tuning`, such as the sizes of an update.
    """
    wanted = [one_batch_gradient(model, window) for window in windows_of(rows, num_processes, **arguments)]
    found = accumulated_gradients(model, rows, **arguments)
    assert [f.keys() for f in found] == [w.keys() for w in wanted]
    return [relative_error(f, w) for f, w in zip(found, wanted, strict=True)]


def windows_of(rows: Sequence[Row], num_processes: int = 1, **arguments: Any) -> list[list[Row]]:
    """Return the rows of each window of the run."""
    known = inspect.signature(plan).parameters
    planned = plan(
        len(rows),
        validation_split=0.0,
        num_processes=num_processes,
        **{"n_epochs": 1} | {name: value for name, value in arguments.items() if name in known},
    )
    windows = [window for epoch in planned.epochs for window in planned.windows(epoch)]
    return [[rows[n] for n in window.rows] for window in windows]


def accumulated_gradients(model: nn.Module, rows: Sequence[Row], **arguments: Any) -> list[dict[str, Tensor]]:
    """Return the gradient of each window of the run as the optimizer receives it."""
    optimizer = RecordingOptimizer(model)
    test_fine_tuning(
        model,
        train_data=list(rows),
        optimizer=optimizer,
        validation_split=0.0,
        gradient_clip_norm=None,
        progress=False,
        **{"n_epochs": 1} | arguments,
    )
    return optimizer.gradients
