"""The time that a run takes, over all of its parts where it was interrupted."""

import time
from typing import Any


class Clock:
    """Seconds in training and evaluation."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._started = time.perf_counter() - state_dict["seconds"]
