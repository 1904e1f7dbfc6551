"""One process of a job: `python -m gpu_checks.work JOB RANK`. Writes its result beside the job, in JSON."""

import json
import sys
from pathlib import Path

import torch

from .exactness import gradient_errors
from .head_losses import measure_head_losses
from .job import Job
from .memory_habits import measure_habits
from .resume import train_and_save
from .training import measure

PARTS = {
    "exactness": gradient_errors,
    "memory and speed": measure,
    "resume": train_and_save,
    "memory habits": measure_habits,
    "head losses": measure_head_losses,
}


def main(file: Path, rank: int) -> None:
    job = Job.read(file)
    found = PARTS[job.part](job, rank)
    file.with_name(f"{rank}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
