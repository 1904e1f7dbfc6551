"""Audits of collated batches on two processes with unequal shares, with and without room for one batch."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from batch_audits import auditor_of, dummy, objective_of, sample_of, weighted_error, window_of
from ftaccum.accumulation.audit import Audit
from ftaccum.planning.audit_schedule import AuditSize
from ftaccum.runtime.accelerator import accelerator_session
from ftaccum.runtime.process_group import open_process_group
from ftaccum.settings.runtime import Runtime
from heads import HEADS, all_in_float64, one_batch

assert os.environ["WORLD_SIZE"] == "2"
torch.set_num_threads(1)
SHARES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "causal LM, Llama": ((3, 1, 4, 1), (2, 5)),
    "masked LM, BERT": ((), (3, 1, 2)),
}


def rows_in(batch: Any) -> float:
    return len(batch["labels"])


def audited(
    name: str,
    shares: Sequence[Sequence[int]],
    count: Callable[[Any], float] | None = None,
    *,
    size: AuditSize = AuditSize.WHOLE_WINDOW,
    wrap: bool = True,
) -> Audit:
    """Return the audit of a window of which each process has a share, in micro-batches of these sizes.

    Args:
        wrap: whether DDP syncs gradients, for which all processes need as many passes; if not, they are averaged later.
    """
    head = HEADS[name]
    model = head.model()
    rows = head.rows(sum(map(sum, shares)))
    with accelerator_session(Runtime(), 0, None) as accelerator, open_process_group(2) as group:
        objective = objective_of(head, model, count)
        first = group.index * sum(shares[0])
        window = window_of(objective, rows[first:], shares[group.index])
        if wrap:
            missing = max(map(len, shares)) - len(window)
            window = [*[dummy(objective, one_batch(rows[:1]))] * missing, *window]
        wrapped = accelerator.prepare_model(model) if wrap else model
        assert (wrapped is not model) == wrap
        sample = sample_of(window, objective, group, size=size)
        assert sample is not None
        audit = auditor_of(accelerator, model, objective, group, wrapped).audit(sample, tolerance=None)
        assert audit is not None
        assert group.gather(audit) == [audit, audit]
        if group.index == 1:  # has one batch that cannot be taken apart
            window[-1] = replace(window[-1], batch=window[-1].batch | {"extra": torch.zeros(())})
        assert sample_of(window, objective, group) is None
    return audit


def check(reference: str) -> None:
    """Check that right counts are at rounding, and that a wrong count is not."""
    for name, shares in SHARES.items():
        for wrap in (True, False):
            audit = audited(name, shares, wrap=wrap)
            assert (audit.reference, audit.n_rows) == (reference, sum(map(sum, shares)))
            assert audit.error < 1e-12, (name, audit)
            assert audit.rounding is not None
            assert audit.rounding < 1e-6
    assert audited("masked LM, BERT", SHARES["masked LM, BERT"], size=AuditSize.FEW_ROWS).error < 1e-12
    assert audited("image classification, ViT", ((2, 1, 1, 2, 1), (1, 2)), size=AuditSize.FEW_ROWS).error < 1e-12
    shares = SHARES["causal LM, Llama"]
    head, sizes = HEADS["causal LM, Llama"], [*shares[0], *shares[1]]
    expected = weighted_error(head.model(), head.rows(sum(sizes)), sizes, rows_in)
    found = audited("causal LM, Llama", shares, rows_in).error
    assert expected > 0.01
    assert abs(found / expected - 1) < 0.1 if reference == "one batch" else found > 0.01, (found, expected)


with all_in_float64():
    check("one batch")
    with patch("ftaccum.accumulation.one_batch.free_memory", lambda _: 0):
        check("another cut")
print("audited")
