"""Start scripts on several processes for the tests.

The processes are forks of a fork of the tests' own process, which has already imported torch and Transformers, because
the import takes as long as most of the scripts.
"""

import json
import os
import runpy
import signal
import sys
import traceback
import warnings
from functools import partial
from pathlib import Path
from typing import Any

_SECONDS = 200.0
_SECONDS_FOR_THE_OTHER = 30.0  # after one process has failed, as with a launcher


class Launcher:
    """A fork of this process that starts scripts. It sees nothing of what the tests do after it was made."""

    def __init__(self) -> None:
        job_end, jobs = os.pipe()
        answers, answer_end = os.pipe()
        self._id = os.fork()
        if not self._id:
            os.close(jobs)  # so that the launcher ends with the tests' process
            _serve(job_end, answer_end)
        os.close(job_end)
        os.close(answer_end)
        self._jobs, self._answers = os.fdopen(jobs, "w"), os.fdopen(answers)

    def statuses(self, job: dict[str, Any]) -> list[int | None]:
        """Run a script and return the exit statuses of its processes.

        Args:
            job: the script, its arguments, and a file for the output of each process (`logs`).
        """
        self._jobs.write(json.dumps(job) + "\n")
        self._jobs.flush()
        statuses: list[int | None] = json.loads(self._answers.readline())
        return statuses

    def close(self) -> None:
        self._jobs.close()
        self._answers.close()
        os.waitpid(self._id, 0)


def _serve(jobs: int, answers: int) -> None:
    """Answer each job, a line in JSON, with a line of exit statuses. Never returns."""
    status = 1
    try:
        _leave_the_tests()
        with os.fdopen(jobs) as lines, os.fdopen(answers, "w") as answered:
            for line in lines:
                print(json.dumps(_started(json.loads(line))), file=answered, flush=True)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _leave_the_tests() -> None:
    """Undo what pytest has set for tests alone, and let scripts import their neighbors."""
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)  # as Python itself does
    sys.stdin, sys.stdout, sys.stderr = (open(n, mode, closefd=False) for n, mode in enumerate("rww"))  # noqa: SIM115
    here = Path(__file__).parent
    for folder in (here, here / "processes", here.parent / "scripts"):
        sys.path.insert(0, str(folder))
    import peft  # noqa: F401
    import torch
    import transformers.trainer  # noqa: F401

    import structures  # noqa: F401

    torch.set_num_threads(1)


def _work(job: dict[str, Any], rank: int) -> int:  # noqa: ARG001
    sys.argv = [job["script"], *job["arguments"]]
    try:
        runpy.run_path(job["script"], run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _started(job: dict[str, Any]) -> list[int | None]:
    from forking import Team

    team = Team(partial(_work, job), [Path(log) for log in job["logs"]])
    ranks = range(len(job["logs"]))
    team.until(lambda: any(team.statuses.values()), _SECONDS)  # all have succeeded, or one has failed
    team.over(_SECONDS_FOR_THE_OTHER if team.statuses else 0)
    for rank in ranks:
        team.send(rank, signal.SIGKILL)
    team.over(_SECONDS_FOR_THE_OTHER)
    return [team.statuses.get(rank) for rank in ranks]
