"""The job of all contenders of scripts/bench_trainer.py: rows, sizes, and settings of the optimizer."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from measuring import DEVICE
from workloads import Workload

RATE, DECAY, CLIP = 2e-5, 0.01, 1.0


@dataclass(frozen=True)
class Job:
    """One epoch over `rows`, with the same number of updates of batch_size × k rows for every contender.

    Attributes:
        precision: "no" for float32, or "bf16".
    """

    workload: Workload
    rows: Dataset
    batch_size: int
    k: int
    seed: int
    precision: str

    @property
    def updates(self) -> int:
        return -(-len(self.rows) // (self.batch_size * self.k))

    @property
    def longest(self) -> int:
        return max(map(len, self.rows["input_ids"]))


def sizes(job: Job) -> dict[str, Any]:
    return {"batch_size": job.batch_size, "gradient_accumulation_steps": job.k}


def trainer_settings(job: Job) -> dict[str, Any]:
    """Return the settings of Transformers' Trainer, and of trainers derived from it, except for its folder."""
    return {
        "num_train_epochs": 1, "per_device_train_batch_size": job.batch_size, "gradient_accumulation_steps": job.k,
        "learning_rate": RATE, "weight_decay": DECAY, "max_grad_norm": CLIP, "optim": "adamw_torch_fused",
        "lr_scheduler_type": "linear", "bf16": job.precision == "bf16", "seed": job.seed, "save_strategy": "no",
        "report_to": [], "disable_tqdm": True, "use_cpu": DEVICE.type == "cpu",
    }  # fmt: skip
