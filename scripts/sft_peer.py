"""TRL's SFTTrainer as a contender of scripts/bench_trainer.py, on rows that are already tokenized and labelled.

SFTTrainer keeps given `labels`. Its loss projects only labelled positions, in chunks, as is its default.
"""

import warnings
from tempfile import TemporaryDirectory
from typing import Any

from trl import SFTConfig, SFTTrainer, pack_dataset

from jobs import Job, trainer_settings


def sft(model: Any, job: Job, *, checkpointing: bool = False) -> None:
    """Run SFTTrainer without packing.

    Args:
        checkpointing: whether to compute activations again in the backward pass, as is SFTTrainer's default. The other
            contenders do not.
    """
    _train(model, job, job.rows, gradient_checkpointing=checkpointing, max_length=None)  # the rows are already cut


def sft_packed(model: Any, job: Job) -> None:
    """Run SFTTrainer with packing, in as many updates.

    A packed row is as long as the longest row, and a micro-batch is one of them: SFTTrainer joins the rows of a
    micro-batch, whose attention without flash attention would cost the square of their joint length. Each update has an
    equal share of the packed rows, so it does not have the same rows as those of the other contenders.
    """
    n_packed = len(pack_dataset(job.rows.select_columns(["input_ids", "labels"]), job.longest))
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": -(-n_packed // job.updates)}
    _train(model, job, job.rows, gradient_checkpointing=False, packing=True, max_length=job.longest, **sizes)


def _train(model: Any, job: Job, rows: Any, **options: Any) -> None:
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = SFTConfig(folder, **trainer_settings(job) | options)
        SFTTrainer(model, config, train_dataset=rows, processing_class=job.workload.tokenizer).train()
