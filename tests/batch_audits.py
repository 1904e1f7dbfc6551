"""Audits of collated batches of `heads`, as a loop would make them that is not ftaccum's."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ftaccum.accumulation.accumulator import GradientAccumulator
from ftaccum.accumulation.audit import GradientAuditor
from ftaccum.bridges.audit_batches import AuditBatches
from ftaccum.data.batches import take
from ftaccum.data.loader import MicroBatch
from ftaccum.objective.item_counts import ItemCounter
from ftaccum.objective.model_forward import ModelForward
from ftaccum.objective.objective import Objective
from ftaccum.objective.sample import Sample
from ftaccum.objective.self_check import measured_objective
from ftaccum.planning.audit_schedule import AuditSize
from ftaccum.planning.micro_batches import MicroBatchRows
from ftaccum.runtime.gradients.averaged import AveragedGradients
from ftaccum.runtime.gradients.plain import GradientStrategy
from ftaccum.runtime.process_group import ProcessGroup
from heads import IGNORED, PAD, Head, Row, one_batch

FILL = {"input_ids": PAD, "labels": IGNORED}
Count = Callable[[Any], float]


def objective_of(head: Head, model: nn.Module, count: Count | None = None) -> Objective:
    """Return a head's objective, measured on four rows; with `count`, one that counts in this way instead."""
    rows = head.rows(4)
    together = one_batch(rows)
    sample = Sample(together, together, lambda batch, groups: [take(batch, group) for group in groups], None)
    forward = ModelForward(model, together, None)
    measured = measured_objective(model, forward, sample, item_counter=ItemCounter())
    return measured if count is None else Objective(forward, lambda batch: {"loss": count(batch)}, measured.report)


def micro_batch(objective: Objective, batch: Any) -> MicroBatch:
    counts = objective.count(batch)
    return MicroBatch(batch, counts, tuple(term for term, n in counts.items() if n), MicroBatchRows(), 0, 0)


def dummy(objective: Objective, batch: Any) -> MicroBatch:
    return MicroBatch(batch, dict.fromkeys(objective.terms, 0), objective.terms, MicroBatchRows(), 0, 0)


def window_of(objective: Objective, rows: Sequence[Row], sizes: Sequence[int], left: bool = False) -> list[MicroBatch]:
    """Return rows in micro-batches of these sizes, each padded to its own width."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    shares = [rows[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    return [micro_batch(objective, one_batch(share, left)) for share in shares]


def auditor_of(
    accelerator: Accelerator, model: nn.Module, objective: Objective, group: ProcessGroup, wrapped: nn.Module
) -> GradientAuditor:
    """Return an auditor of a model, and of the same model as it is wrapped for several processes, if it is."""
    sgd = torch.optim.SGD(model.parameters())
    strategy = AveragedGradients(model) if wrapped is model else GradientStrategy(sgd)
    accumulator = GradientAccumulator(accelerator, wrapped, objective, strategy, group)
    return GradientAuditor(accelerator, model, objective, strategy, group, accumulator)


def sample_of(
    window: Sequence[MicroBatch], objective: Objective, group: ProcessGroup, size: AuditSize = AuditSize.WHOLE_WINDOW
) -> AuditBatches | None:
    return AuditBatches.of(window, objective, group, FILL, size)


def weighted_error(model: nn.Module, rows: Sequence[Row], sizes: Sequence[int], count: Count) -> float:
    """Return the error of the gradient of the means of batches, weighted by a count, in plain PyTorch."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    batches = [one_batch(rows[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
    total = sum(map(count, batches))

    def gradient(parts: Sequence[tuple[dict[str, Tensor], float]]) -> Tensor:
        model.zero_grad()
        for batch, weight in parts:
            (model(**batch).loss * weight).backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return found

    wanted = gradient([(one_batch(rows), 1.0)])
    return float((gradient([(batch, count(batch) / total) for batch in batches]) - wanted).norm() / wanted.norm())
