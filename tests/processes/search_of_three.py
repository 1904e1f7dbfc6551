"""Three workers that share a study: for each line `URL N_TRIALS here|elsewhere` on standard input, three processes.

Print their ids and, when all have ended, their statuses in the same order. The processes are forked: they start
simultaneously, and the imports, which take longest, happen once. With "elsewhere", each process treats the others as
if they ran on other machines: it recognizes a dead one only by its missing heartbeat.
"""

import os
import sys
import time

import torch

import ftaccum.apps.search.retry
import ftaccum.apps.search.study
from searching import Layer, quick


class Slow(Layer):
    """A slow model, so that trials overlap and one can be killed in the middle."""

    def forward(self, points_BD: torch.Tensor) -> torch.Tensor:
        time.sleep(0.003)
        return super().forward(points_BD)


def work(url: str, n_trials: str, where: str) -> None:
    if where == "elsewhere":
        ftaccum.apps.search.retry._machine = lambda: f"the machine of {os.getpid()}"
        # Seconds instead of minutes, but enough that a slow worker does not look dead.
        ftaccum.apps.search.study._HEARTBEAT, ftaccum.apps.search.study.GRACE = 1, 3
    # The median pruner prunes no trial in the beginning, when the test kills a worker.
    quick(model_factory=Slow, storage=url, study_name="shared", n_trials=int(n_trials), pruner="median")


for order in sys.stdin:
    workers = []
    for _ in range(3):
        if (process := os.fork()) == 0:
            sys.stdout = sys.stderr  # keep the search's output out of this script's output
            work(*order.split())
            sys.exit()
        workers.append(process)
    print(*workers, flush=True)
    print(*(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in workers), flush=True)
