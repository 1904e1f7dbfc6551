"""The processes that run each trial together. Only the main process has the study."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from ...runtime.accelerator import launched_state
from ...runtime.process_group import ProcessGroup, open_process_group

T = TypeVar("T")

_ORDERS_WITHIN = timedelta(days=7)  # the main process may wait for a worker on another machine
_OUTCOMES_WITHIN = timedelta(minutes=3)  # from the first process that ends a trial to the last


class OutOfStepError(RuntimeError):
    """The processes of a trial are out of step. Only a restart of all of them helps."""


@dataclass(frozen=True)
class TrialProcesses:
    """The processes that run each trial together.

    Attributes:
        orders: the group in which the main process announces what to do next. It may take days.
        outcomes: the group in which each process reports how a trial ended. It times out after some minutes.
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
            OutOfStepError: if a process does not answer in time, because it is still in the middle of the trial.
        """
        try:
            return self.outcomes.gather(outcome)
        except RuntimeError as error:
            raise OutOfStepError(
                f"This process ended a trial ({outcome}), but another one did not within {_OUTCOMES_WITHIN}. Restart "
                "all processes to resume the study."
            ) from error


@contextmanager
def open_trial_processes() -> Iterator[TrialProcesses]:
    """Connect the processes that were launched together. Call it on all processes."""
    size = launched_state().num_processes
    with (
        open_process_group(size, _ORDERS_WITHIN) as orders,
        open_process_group(size, _OUTCOMES_WITHIN) as outcomes,
    ):
        yield TrialProcesses(orders, outcomes)
