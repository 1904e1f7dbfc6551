"""Runs `test_fine_tuning` on fixed weights, and holds every window's gradient against one batch in plain PyTorch."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from ftaccum import plan, test_fine_tuning
from heads import RecordingOptimizer, Row, one_batch_gradient, relative_error


def window_errors(model: nn.Module, rows: Sequence[Row], *, num_processes: int = 1, **arguments: Any) -> list[float]:
    """The relative gradient error of each window of one epoch, or of `n_epochs`, on this process.

    Args:
        arguments: of `test_fine_tuning`: the sizes of an update, and whatever else.
    """
    arguments = {"n_epochs": 1} | arguments
    known = inspect.signature(plan).parameters
    planned = plan(
        len(rows),
        validation_split=0.0,
        num_processes=num_processes,
        **{name: value for name, value in arguments.items() if name in known},
    )
    windows = [window for epoch in planned.epochs for window in planned.windows(epoch)]
    wanted = [one_batch_gradient(model, [rows[n] for n in window.rows]) for window in windows]
    optimizer = RecordingOptimizer(model)
    test_fine_tuning(
        model,
        train_data=list(rows),
        optimizer=optimizer,
        validation_split=0.0,
        gradient_clip_norm=None,
        progress=False,
        **arguments,
    )
    for found, one in zip(optimizer.gradients, wanted, strict=True):
        assert found.keys() == one.keys(), "a weight that no row of the window uses has no gradient, not one of zeros"
    return [relative_error(f, w) for f, w in zip(optimizer.gradients, wanted, strict=True)]
