"""A run that is killed and resumed, compared with an undisturbed one to the last bit."""

import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ftaccum import test_fine_tuning

from .job import Job, new_model, rows_of
from .launch import PartError, Processes, run

_UPDATES, _STOPS_AFTER, _EVERY = 6, 5, 2  # updates of a run, before it is killed, and between two checkpoints
_BATCH_SIZE, _K = 2, 2
_FOR_THE_WRITER = 1.0  # seconds in which the last checkpoint is written in the background
_MUCH_LONGER = 600.0


class StopAfter(TrainerCallback):
    """Records the first update of this start, and waits for the kill after a later one."""

    def __init__(self, folder: Path, rank: int, stops_after: int) -> None:
        self.first: int | None = None
        self._file, self._stops_after = folder / f"reached.{rank}", stops_after

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if self.first is None:
            self.first = state.global_step
        if state.global_step == self._stops_after:
            time.sleep(_FOR_THE_WRITER)
            self._file.touch()
            time.sleep(_MUCH_LONGER)


def train_and_save(job: Job, rank: int) -> dict[str, Any]:
    """Train each of the job's runs, or resume those that an earlier start has begun. Return the numbers of the last."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    return [_train_one(name, job, rank) for name in job.names][-1]


def _train_one(name: str, job: Job, rank: int) -> dict[str, Any]:
    """Train or resume one run, and save this process's part of the weights."""
    run_folder, model = Path(job.folder).parent / name, new_model(job.model)
    run_folder.mkdir(parents=True, exist_ok=True)
    stop = StopAfter(Path(job.folder), rank, job.stops_after)
    rows = rows_of(model.config.vocab_size, _UPDATES * _BATCH_SIZE * _K * job.num_processes, 24, shortest=4)
    result = test_fine_tuning(
        model, train_data=rows, n_epochs=1, validation_split=0.0, batch_size=_BATCH_SIZE,
        gradient_accumulation_steps=_K, audit=False, progress=False, callbacks=[stop], resume="auto",
        checkpoint_every=_EVERY, output_dir=str(run_folder / "output"), **job.ways[job.way],
    )  # fmt: skip
    parts = {name: (p.to_local() if isinstance(p, DTensor) else p) for name, p in model.named_parameters()}
    torch.save({name: p.detach().cpu().contiguous() for name, p in parts.items()}, run_folder / f"{rank}.pt")
    return {"first update": stop.first, "losses": list(result.loss_history)}


def resume_check(folder: Path, way: str, num_processes: int, seconds: float) -> dict[str, Any]:
    """Kill and resume a run of one way, and return how many bits differ from an undisturbed one.

    Raises:
        PartError: if a start fails, or the killed run did not resume.
    """
    deadline = time.monotonic() + seconds

    def job(step: str, *names: str, stops_after: int = 0) -> Job:
        left = max(1.0, deadline - time.monotonic())
        return Job(
            "resume", str(folder / step), num_processes, seconds=left, way=way, names=names, stops_after=stops_after
        )

    undisturbed = run(job("start-1", "again", "undisturbed"))
    killed = job("start-2", "killed", stops_after=_STOPS_AFTER)
    with Processes(killed) as processes:
        marks = [folder / "start-2" / f"reached.{rank}" for rank in range(num_processes)]
        if not processes.wait(killed.seconds, lambda: all(mark.exists() for mark in marks)):
            raise PartError("the run ended before it was killed")
        processes.kill()
    resumed = run(job("start-3", "killed"))
    first = resumed[0]["first update"]
    if first is None or first <= 1:
        raise PartError("the killed run began anew, and has found no checkpoint")
    return {
        "resumed at update": first,
        "updates": _UPDATES,
        "differing bits": differing_bits(folder / "undisturbed", folder / "killed", num_processes),
        "differing losses": sum(a != b for a, b in zip(undisturbed[0]["losses"], resumed[0]["losses"], strict=True)),
        "differing bits of two undisturbed runs": differing_bits(
            folder / "undisturbed", folder / "again", num_processes
        ),
    }


def differing_bits(one: Path, other: Path, num_processes: int) -> int:
    """Return how many bits of the saved weights differ, over all processes."""
    total = 0
    for rank in range(num_processes):
        first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for folder in (one, other))
        assert first.keys() == second.keys()
        total += sum(_bits(first[name], second[name]) for name in first)
    return total


def _bits(one: torch.Tensor, other: torch.Tensor) -> int:
    different = one.reshape(-1).view(torch.uint8) ^ other.reshape(-1).view(torch.uint8)
    return sum(int((different >> n & 1).sum()) for n in range(8))
