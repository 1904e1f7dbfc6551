"""Dummy micro-batches, which must have no effect."""

from contextlib import ExitStack

from torch import nn

from ..data.loader import MicroBatch
from ..objective.objective import Objective
from ..runtime.state_guards import preserve_buffers, preserve_rng, training_mode


def leaving_no_trace(micro: MicroBatch, model: nn.Module, objective: Objective) -> ExitStack:
    """Return a context manager that restores random state and buffers after the pass of a dummy micro-batch."""
    stack = ExitStack()
    if micro.is_dummy:
        stack.enter_context(preserve_rng())
        stack.enter_context(preserve_buffers(model, *objective.modules))
        if objective.report.in_training.complaint is not None:  # cannot run single rows, as in a dummy
            stack.enter_context(training_mode(model, training=False))
    return stack
