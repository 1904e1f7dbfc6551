"""Three workers that share a study: for each line `URL N_TRIALS here|elsewhere` on standard input, three processes.

Prints their numbers, and when all have ended their statuses, in the same order. They are forked, and so all begin at
the same moment, and what takes longest, to import, is done once. "elsewhere" has each know as little of the others as
if it ran on a machine of its own: of one that died it sees that its heartbeat has stopped.
"""

import os
import sys
import time

import torch

import ftaccum.apps.search.retry
import ftaccum.apps.search.study
from searching import Layer, quick


class Slow(Layer):
    """Trials that take long enough to overlap, and for one to be ended in the middle."""

    def forward(self, points_BD: torch.Tensor) -> torch.Tensor:
        time.sleep(0.003)
        return super().forward(points_BD)


def work(url: str, n_trials: str, where: str) -> None:
    if where == "elsewhere":
        ftaccum.apps.search.retry._machine = lambda: f"the machine of {os.getpid()}"
        # Of minutes, otherwise. One that is only slow must not be taken for dead.
        ftaccum.apps.search.study._HEARTBEAT, ftaccum.apps.search.study.GRACE = 1, 3
    # The median prunes nobody in the beginning, when one is to be killed.
    quick(model_factory=Slow, storage=url, study_name="shared", n_trials=int(n_trials), pruner="median")


for order in sys.stdin:
    workers = []
    for _ in range(3):
        if (process := os.fork()) == 0:
            sys.stdout = sys.stderr  # what a search shows is not for who reads this one's
            work(*order.split())
            sys.exit()
        workers.append(process)
    print(*workers, flush=True)
    print(*(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in workers), flush=True)
