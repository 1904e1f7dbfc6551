"""What the contenders of scripts/compare_embeddings.py share: the task, the outcome, dropout and the memory in use.

This module does not need ftaccum, because sentence-transformers runs in an environment of its own.
"""

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import TrainerCallback


@dataclass(frozen=True)
class Task:
    """Pairs of texts and how to train on them.

    Attributes:
        train, val: pairs (anchor, positive).
        windows: the rows of each update, by their places in `train`.
        batch_size: rows of a forward pass.
    """

    model: str
    train: list[tuple[str, str]]
    val: list[tuple[str, str]]
    windows: list[list[int]]
    batch_size: int
    effective_batch_size: int
    max_length: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    clip: float
    scale: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What a contender measured.

    Attributes:
        losses: the loss of each update, before its step.
        seconds, cpu_seconds: of each update from the second on. Other processes on the machine prolong the first more
            than the second.
        before, peak: resident memory in bytes, before training and at most until its end.
        held_out: the embeddings of the anchors and of the positives in `val`.
    """

    losses: list[float]
    seconds: list[float]
    cpu_seconds: list[float]
    before: int
    peak: int
    held_out: list[list[list[float]]]


class Clock(TrainerCallback):
    """Keeps the time and this process's CPU time at the end of each update."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))

    def seconds(self) -> list[float]:
        return [end - start for (start, _), (end, _) in pairwise(self.ends)]

    def cpu_seconds(self) -> list[float]:
        return [end - start for (_, start), (_, end) in pairwise(self.ends)]


class Memory(NamedTuple):
    """Resident memory of this process in bytes, now and at most since it started."""

    now: int
    peak: int


def memory() -> Memory:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return Memory(*(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")))


def without_dropout(model: nn.Module) -> None:
    """Switch dropout off, so that the order of the forward passes does not matter."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
