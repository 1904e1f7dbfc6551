"""Runs `test_fine_tuning` on fixed weights, and holds every window's gradient against one batch in plain PyTorch."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ftaccum import plan, test_fine_tuning
from heads import RecordingOptimizer, Row, one_batch_gradient, relative_error


def window_errors(model: nn.Module, rows: Sequence[Row], *, num_processes: int = 1, **arguments: Any) -> list[float]:
    """The relative gradient error of each window of one epoch, on this process.

    Args:
        arguments: of `test_fine_tuning`: the sizes of an update, and whatever else.
    """
    sizes = ("batch_size", "gradient_accumulation_steps", "effective_batch_size")
    planned = plan(
        len(rows),
        n_epochs=1,
        validation_split=0.0,
        num_processes=num_processes,
        **{name: arguments[name] for name in sizes if name in arguments},
    )
    wanted = [one_batch_gradient(model, [rows[n] for n in window.rows]) for window in planned.windows(0)]
    optimizer = RecordingOptimizer(model)
    test_fine_tuning(
        model,
        train_data=list(rows),
        optimizer=optimizer,
        n_epochs=1,
        validation_split=0.0,
        gradient_clip_norm=None,
        progress=False,
        **arguments,
    )
    for found, one in zip(optimizer.gradients, wanted, strict=True):
        assert found.keys() == one.keys(), "a weight that no row of the window uses has no gradient, not one of zeros"
    return [relative_error(f, w) for f, w in zip(optimizer.gradients, wanted, strict=True)]
