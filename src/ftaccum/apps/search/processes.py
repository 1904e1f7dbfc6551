"""The processes that run one trial together. The main one has the study; all do the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState

from ...runtime.process_group import ProcessGroup, open_process_group

T = TypeVar("T")

_ORDERS_WITHIN = timedelta(days=7)  # the main process may wait for a worker elsewhere
_OUTCOMES_WITHIN = timedelta(minutes=3)  # from the first process that ends a trial to the last


class OutOfStepError(RuntimeError):
    """The processes of a trial are out of step, which only a restart of all of them can fix."""


@dataclass(frozen=True)
class TrialProcesses:
    """The processes that run each trial together.

    Attributes:
        orders: the group in which the main process says what to do next. It may be silent for days.
        outcomes: the group in which every process says how a trial ended. Silence is an error after some minutes.
    """

    orders: ProcessGroup
    outcomes: ProcessGroup

    @property
    def size(self) -> int:
        return self.orders.size

    @property
    def is_main(self) -> bool:
        return self.orders.is_main

    def gather_outcomes(self, outcome: T) -> list[T]:
        """Return the outcome of a trial on each process, in order of rank.

        Raises:
            OutOfStepError: where a process says nothing for too long: it is still in the middle of what this one left.
        """
        try:
            return self.outcomes.gather(outcome)
        except RuntimeError as error:
            raise OutOfStepError(
                f"This process ended a trial ({outcome}), and another one did not in {_OUTCOMES_WITHIN}. Start all of "
                "them again: the study resumes where it was."
            ) from error


@contextmanager
def open_trial_processes() -> Iterator[TrialProcesses]:
    """Connect the processes that were launched together. All processes call it alike."""
    size = PartialState(cpu=not torch.accelerator.is_available()).num_processes
    with (
        open_process_group(size, _ORDERS_WITHIN) as orders,
        open_process_group(size, _OUTCOMES_WITHIN) as outcomes,
    ):
        yield TrialProcesses(orders, outcomes)
