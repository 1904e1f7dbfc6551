"""The processes that run one trial together. The first of them has the study; all do the same."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import distributed

from ..errors import DataError, SettingsError

T = TypeVar("T")

_ORDERS_WITHIN = timedelta(days=7)  # the first process may wait for a worker elsewhere
_OUTCOMES_WITHIN = timedelta(minutes=3)  # from the first process that ends a trial to the last


class LostError(RuntimeError):
    """Processes of a trial are out of step, which only starting all of them again can mend."""


@dataclass(frozen=True)
class _Failed:
    error: BaseException


class Team:
    """What one process knows or decides, told to all. They talk from host to host, over gloo, beside the trials."""

    def __init__(self) -> None:
        state = PartialState(cpu=not torch.accelerator.is_available())
        self.size, self.is_main = state.num_processes, state.is_main_process
        self._orders, self._outcomes = (self._group(within) for within in (_ORDERS_WITHIN, _OUTCOMES_WITHIN))

    def _group(self, within: timedelta) -> distributed.ProcessGroup | None:
        return None if self.size == 1 else distributed.new_group(backend="gloo", timeout=within)

    def close(self) -> None:
        """Gives up the groups. All processes call it alike."""
        for group in (self._orders, self._outcomes):
            if group is not None:
                distributed.destroy_process_group(group)

    def told(self, word: Any = None) -> Any:
        """What the first process says, on every process."""
        words = [word]
        if self.size > 1:
            distributed.broadcast_object_list(words, src=0, group=self._orders)
        return words[0]

    def decided(self, decide: Callable[[], T]) -> T:
        """What the first process finds, told to all. Where finding it raises, all raise, and none is left waiting."""
        if not self.is_main:
            said: Any = self.told()
            if isinstance(said, _Failed):
                raise said.error
            return said
        try:
            found = decide()
        except BaseException as error:
            ours = isinstance(error, SettingsError | DataError)  # others may not survive the way
            self.told(_Failed(error if ours else RuntimeError(f"The first process failed: {error!r}")))
            raise
        return self.told(found)

    def everyone(self, word: T) -> list[T]:
        """What each process says, in order.

        Raises:
            LostError: where a process says nothing for too long: it is still in the middle of what this one has left.
        """
        if self.size == 1:
            return [word]
        words: list[Any] = [None] * self.size
        try:
            distributed.all_gather_object(words, word, group=self._outcomes)
        except RuntimeError as error:
            raise LostError(
                f"This process ended a trial ({word}), and another one did not in {_OUTCOMES_WITHIN}. All have to be "
                "started again; the study goes on where it was."
            ) from error
        return words
