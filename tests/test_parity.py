"""Faults that affect every split equally, found by a plain loop and recorded numbers."""

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from ftaccum import plan, test_fine_tuning
from heads import HEADS, all_in_float64, one_batch
from training_passes import is_training_pass


def test_weights_and_histories_equal_those_of_a_plain_loop_over_large_batches() -> None:
    head = HEADS["causal LM, Llama"]
    rows = head.rows(31)
    windows = [
        window
        for epoch in range(2)
        for window in plan(31, batch_size=12, n_epochs=2, validation_split=0.0).windows(epoch)
    ]

    with all_in_float64():
        plain = head.model().train()
        decayed = [p for p in plain.parameters() if p.ndim > 1]
        others = [p for p in plain.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        schedule = get_cosine_schedule_with_warmup(optimizer, 2, len(windows))
        losses, norms, rates = [], [], []
        for window in windows:
            loss = plain(**one_batch([rows[n] for n in window.rows])).loss
            loss.backward()
            rates.append(schedule.get_last_lr()[0])
            losses.append(loss.item())
            norms.append(nn.utils.clip_grad_norm_(plain.parameters(), 0.5).item())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

        model = head.model()
        result = test_fine_tuning(
            model, train_data=rows, n_epochs=2, validation_split=0.0, batch_size=3, gradient_accumulation_steps=4,
            learning_rate=1e-3, weight_decay=0.1, lr_scheduler="cosine", warmup_steps=2, gradient_clip_norm=0.5,
            progress=False,
        )  # fmt: skip

    assert result.loss_history == pytest.approx(losses, rel=1e-9)
    assert result.grad_norm_history == pytest.approx(norms, rel=1e-9)
    assert result.lr_history == pytest.approx(rates, rel=1e-12)
    assert max(norms) > 0.5, "clipping was never put to use"
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-12), name


def test_golden_losses() -> None:
    """If only this test fails and the one above passes, rows or initial weights are drawn differently than before (a
    new torch, another use of the seed). Resumed and repeated runs then differ, which a release note must state."""
    head = HEADS["sequence classification, BERT"]
    result = test_fine_tuning(
        head.model(), train_data=head.rows(20), n_epochs=1, validation_split=0.2, batch_size=2,
        gradient_accumulation_steps=2, learning_rate=1e-2, progress=False,
    )  # fmt: skip
    assert result.loss_history == pytest.approx(GOLDEN, rel=1e-6)


GOLDEN = [1.095657060237912, 1.06724709287784, 1.1913636773276384, 1.1433180044519013]


def test_weights_do_not_change_between_updates() -> None:
    """Only the optimizer changes them, once per window."""
    head = HEADS["sequence classification, BERT"]
    model = head.model()
    seen = []
    model.register_forward_pre_hook(
        lambda *_: seen.append(model.classifier.weight.detach().clone()) if is_training_pass() else None
    )
    test_fine_tuning(
        model, train_data=head.rows(12), n_epochs=1, validation_split=0.0, batch_size=2,
        gradient_accumulation_steps=3, lr_scheduler="constant", progress=False, audit=False,
    )  # fmt: skip
    assert len(seen) == 6
    assert all(torch.equal(w, seen[0]) for w in seen[:3])
    assert not torch.equal(seen[3], seen[0])
    assert all(torch.equal(w, seen[3]) for w in seen[3:])
    assert all(p.grad is None for p in model.parameters())
