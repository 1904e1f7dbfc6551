"""Start scripts on several processes for the tests.

The processes are forks of this one, which has already imported torch and Transformers, because the import takes as long
as most of the scripts. Each line of input is a job in JSON (script, arguments, files for the output of the processes).
The answer is a line with the exit statuses.
"""

import json
import runpy
import signal
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "processes"))
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import peft  # noqa: F401
import torch
import transformers.trainer  # noqa: F401

import structures  # noqa: F401
from forking import Team

torch.set_num_threads(1)
_SECONDS = 200.0
_SECONDS_FOR_THE_OTHER = 30.0  # after one process has failed, as with a launcher


def work(job: dict[str, Any], rank: int) -> int:  # noqa: ARG001
    sys.argv = [job["script"], *job["arguments"]]
    try:
        runpy.run_path(job["script"], run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def started(job: dict[str, Any]) -> list[int | None]:
    team = Team(partial(work, job), [Path(log) for log in job["logs"]])
    ranks = range(len(job["logs"]))
    team.until(lambda: any(team.statuses.values()), _SECONDS)  # all have succeeded, or one has failed
    team.over(_SECONDS_FOR_THE_OTHER if team.statuses else 0)
    for rank in ranks:
        team.send(rank, signal.SIGKILL)
    team.over(_SECONDS_FOR_THE_OTHER)
    return [team.statuses.get(rank) for rank in ranks]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(started(json.loads(line))), flush=True)
