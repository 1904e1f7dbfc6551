"""The contenders of scripts/bench_trainer.py. All use the same rows, model, optimizer, schedule and clipping."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_linear_schedule_with_warmup

from ftaccum import exact, plan, test_fine_tuning
from jobs import CLIP, DECAY, RATE, Job, sizes, trainer_settings
from measuring import DEVICE
from workloads import Row, Workload

try:
    import sft_peer
except ImportError:
    sft_peer = None  # type: ignore[assignment]

Contender = Callable[[Any, Job], None]


def trainer(strategy: str, *, exactly: bool = False, **options: Any) -> Contender:
    """Return a contender that runs Transformers' Trainer with a `train_sampling_strategy`.

    Args:
        exactly: whether to make it exact, with these options.
    """

    def run(model: Any, job: Job) -> None:
        with TemporaryDirectory() as folder:
            arguments = TrainingArguments(folder, train_sampling_strategy=strategy, **trainer_settings(job))
            trainer_class = exact(**options)(Trainer) if exactly else Trainer
            trainer_class(model, arguments, train_dataset=job.rows, data_collator=job.workload.collate).train()

    return run


def accelerate_loop(model: Any, job: Job) -> None:
    """Run the loop of Accelerate's guide to gradient accumulation, with clipping. It divides by k, not by items."""
    accelerator = Accelerator(
        cpu=DEVICE.type == "cpu", mixed_precision=job.precision, gradient_accumulation_steps=job.k
    )
    optimizer, schedule = _optimizer(model, job.updates)
    loader = DataLoader(job.rows, job.batch_size, shuffle=True, collate_fn=job.workload.collate)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def bare_loop(model: Any, job: Job) -> None:
    """Run a minimal loop as an expert writes it by hand.

    Rows are in memory. The windows are ftaccum's, in equal slices in order of arrival. Each mean is weighted by its
    number of loss items.
    """
    rows = job.rows.to_list()
    windows = list(plan(len(rows), validation_split=0.0, n_epochs=1, random_seed=job.seed, **sizes(job)).windows(0))
    model.to(DEVICE).train()
    optimizer, schedule = _optimizer(model, len(windows))
    autocast = torch.autocast(DEVICE.type, torch.bfloat16) if job.precision == "bf16" else nullcontext()
    losses = []
    for window in windows:
        chosen = [rows[n] for n in window.rows]
        n_items, loss_of_window = job.workload.n_items(chosen), torch.zeros((), device=DEVICE)
        for start in range(0, len(chosen), job.batch_size):
            part = chosen[start : start + job.batch_size]
            batch = {name: values.to(DEVICE, non_blocking=True) for name, values in _padded(part).items()}
            with autocast:
                loss = model(**batch).loss * (job.workload.n_items(part) / n_items)
            loss.backward()
            loss_of_window += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss_of_window)
    torch.stack(losses).tolist()


def ours(options: Callable[[Job], dict[str, Any]]) -> Contender:
    """Return a contender that runs `test_fine_tuning` with options that depend on the job."""

    def run(model: Any, job: Job) -> None:
        fine_tune(model, job, **options(job))

    return run


def fine_tune(model: Any, job: Job, **options: Any) -> Any:
    given = {"validation_split": 0.0, "train_data": job.rows, **sizes(job), **options}

    return test_fine_tuning(
        model, n_epochs=1, learning_rate=RATE, weight_decay=DECAY, gradient_clip_norm=CLIP, random_seed=job.seed,
        mixed_precision=job.precision, progress=False, **given,
    )  # fmt: skip


def ours_dense(model: Any, job: Job) -> None:
    """Run ftaccum with no more than a bare loop does: no planner, and dense gradients of embedding tables."""
    with patch("ftaccum.runtime.gradients.sparse._can_be_sparse", return_value=False):
        fine_tune(model, job, planner=False)


CONTENDERS: dict[str, Contender] = {
    "trainer": trainer("random"),
    "trainer-group": trainer("group_by_length"),
    "trainer-rebalance": trainer("batch_rebalance"),
    "exact": trainer("random", exactly=True),
    "exact-unaudited": trainer("random", exactly=True, audit=False),
    "exact-planned": trainer("random", exactly=True, planner=True),
    "sft": lambda model, job: sft_peer.sft(model, job),
    "sft-checkpointed": lambda model, job: sft_peer.sft(model, job, checkpointing=True),
    "sft-packed": lambda model, job: sft_peer.sft_packed(model, job),
    "accelerate": accelerate_loop,
    "bare": bare_loop,
    "ours-dense": ours_dense,
    "ours-arrival": ours(lambda _: {"planner": False}),
    "ours": ours(lambda _: {}),
    "ours-tokens": ours(lambda _: {"max_tokens": "auto"}),
}
if "loss_head" in signature(test_fine_tuning).parameters:
    CONTENDERS["ours-full-head"] = ours(lambda _: {"loss_head": "full"})
NAMES = {
    "trainer": "`Trainer`",
    "trainer-group": "`Trainer`, `group_by_length`",
    "trainer-rebalance": "`Trainer`, `batch_rebalance`",
    "exact": "`exact(Trainer)`",
    "exact-unaudited": "`exact(Trainer)`, no audits",
    "exact-planned": "`exact(Trainer)`, `planner=True`",
    "sft": "`SFTTrainer`",
    "sft-checkpointed": "`SFTTrainer`, its default of checkpointing",
    "sft-packed": "`SFTTrainer`, `packing=True`",
    "accelerate": "Accelerate's documented loop",
    "bare": "bare PyTorch, arrival order",
    "ours-dense": "ftaccum, `planner=False`, dense embedding gradients",
    "ours-arrival": "ftaccum, `planner=False`",
    "ours": "**ftaccum**",
    "ours-tokens": "ftaccum, `max_tokens` = batch × longest row",
    "ours-full-head": 'ftaccum, `loss_head="full"`',
}


def why_left_out(name: str, workload: Workload) -> str | None:
    """Return why a contender cannot run a workload; None if it can."""
    if not name.startswith("sft"):
        return None
    if workload.tokenizer is None:
        return "SFTTrainer is for conversations"
    return "TRL is not installed" if sft_peer is None else None


def _optimizer(model: Any, updates: int) -> tuple[Any, Any]:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)  # like Trainer and ftaccum
    return optimizer, get_linear_schedule_with_warmup(optimizer, 0, updates)


def _padded(rows: list[Row]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    batch = {}
    for name, first in rows[0].items():
        fill = -100 if name == "labels" else 0
        values = [
            row[name] + [fill] * (width - len(row[name])) if isinstance(first, list) else row[name] for row in rows
        ]
        batch[name] = torch.tensor(values)
    return batch
