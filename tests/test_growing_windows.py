"""Windows that cross the end of an epoch, and windows that grow, still equal one batch each."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from exactness import window_errors
from ftaccum import plan, test_fine_tuning
from ftaccum.tracking.result import Result
from ftaccum.training.loop import TrainingLoop
from heads import HEADS, RecordingOptimizer, Row, all_in_float64, one_batch
from invariance import NAMES, difference, trained
from slow_parameters import some_slow

HEADS_TRIED = ["causal LM, Llama", "sequence classification, BERT", "question answering, BERT", "seq2seq, T5"]
BERT = HEADS["sequence classification, BERT"]
CHANGING: list[dict[str, Any]] = [
    {"remainder": "carry", "effective_batch_size": 12},
    {"remainder": "carry", "gradient_accumulation_steps": [(0, 2), (3, 6)], "n_epochs": 3},
    {"gradient_accumulation_steps": [(0, 2), (3, 6)], "n_epochs": 3, "max_updates": 8},
]


def cut_otherwise(arguments: dict[str, Any], batch_size: int, num_processes: int = 1) -> dict[str, Any]:
    """Return arguments for the same windows, of 4 rows for each step, with another physical batch size."""
    steps = arguments.get("gradient_accumulation_steps")
    if steps is None:
        return arguments | {"batch_size": batch_size}
    cut = [(update, 4 * k // (batch_size * num_processes)) for update, k in steps]
    return arguments | {"batch_size": batch_size, "gradient_accumulation_steps": cut}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS_TRIED)
def test_gradient_of_every_window_of_several_epochs_is_that_of_one_batch(name: str) -> None:
    head = HEADS[name]
    with all_in_float64():
        # 9 rows, 3 epochs: windows of 7, 7, 7 and 6 rows, two of which cross the end of an epoch
        carried = window_errors(
            head.model(), head.rows(), batch_size=2, effective_batch_size=7, n_epochs=3, remainder="carry"
        )
        # 4, 2, 2, 10, 9: a window of 10 from 9 rows contains one of them twice
        growing = window_errors(
            head.model(), head.rows(), batch_size=2, gradient_accumulation_steps=[(0, 2), (1, 1), (3, 5)],
            n_epochs=3, remainder="carry",
        )  # fmt: skip
        # 4, 2, 3, then 9 and no more: no window crosses the end of an epoch
        flushed = window_errors(
            head.model(), head.rows(), batch_size=2, gradient_accumulation_steps=[(0, 2), (1, 1), (2, 5)],
            n_epochs=3, max_updates=4,
        )  # fmt: skip
    assert [len(carried), len(growing), len(flushed)] == [4, 5, 4]
    assert max(carried + growing + flushed) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("arguments", CHANGING)
@pytest.mark.parametrize("name", NAMES)
def test_the_physical_batch_changes_nothing(name: str, arguments: dict[str, Any]) -> None:
    one, *others = (trained(name, **cut_otherwise(arguments, batch_size)) for batch_size in (4, 1, 2))
    assert len(one[1].loss_history) > 5
    assert all(difference(one, other) < 1e-9 for other in others)


@pytest.mark.slow
def test_a_row_that_is_twice_in_a_window_is_collated_and_trained_on_twice() -> None:
    """A random collator gets the whole window, and each of its places is trained on once at any batch size."""
    sizes: dict[str, Any] = {"n_epochs": 4, "effective_batch_size": 4, "remainder": "carry", "validation_split": 0.0}
    planned = plan(5, **sizes)
    windows = [window.rows for epoch in planned.epochs for window in planned.windows(epoch)]
    assert any(len(set(rows)) < 4 for rows in windows)

    head, drawn = HEADS["masked LM, BERT"], list[dict[str, Tensor]]()

    def mask(rows: list[Row]) -> dict[str, Tensor]:
        batch = one_batch([{"input_ids": row["input_ids"]} for row in rows])
        masked = (torch.rand(batch["input_ids"].shape) < 0.5) & batch["attention_mask"].bool()
        drawn.append({**batch, "labels": torch.where(masked, batch["input_ids"], -100)})
        return drawn[-1]

    for batch_size in (4, 1, 3):
        model, rows = head.model(), [{"input_ids": row["input_ids"]} for row in head.rows(5)]
        drawn.clear()
        result = test_fine_tuning(
            model, train_data=rows, data_collator=mask, batch_size=batch_size, optimizer=RecordingOptimizer(model),
            progress=False, audit=False, **sizes,
        )  # fmt: skip
        with torch.no_grad():
            of_windows = [model(**batch).loss.item() for batch in drawn[-len(windows) :]]
        assert result.loss_history == pytest.approx(of_windows, rel=1e-9)


@pytest.mark.parametrize("rule", some_slow(["none", "sqrt", "linear"], ["sqrt"]))
def test_rates_and_weights_equal_those_of_a_plain_loop_that_scales_rates(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One window has a gradient that is not finite. Its update counts for k, but not for the schedule."""
    rows = BERT.rows(12)
    steps, skipped = [(0, 1), (2, 4), (4, 2)], 3
    planned = plan(12, batch_size=1, gradient_accumulation_steps=steps, n_epochs=2, remainder="carry",
                   validation_split=0.0)  # fmt: skip
    windows = [window for epoch in planned.epochs for window in planned.windows(epoch)]
    factors = {"none": [1.0, 1.0, 1.0], "sqrt": [1.0, 2.0, math.sqrt(2)], "linear": [1.0, 4.0, 2.0]}[rule]

    plain = BERT.model().train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, len(windows))
    rates = []
    for n, window in enumerate(windows):
        rates.append(schedule.get_last_lr()[0] * factors[0 if n < 2 else 1 if n < 4 else 2])
        if n == skipped:
            continue
        plain(**one_batch([rows[row] for row in window.rows])).loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rates[-1]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    model = BERT.model()
    held = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)

    class Overflowing(nn.Module):
        """A model whose loss is not finite in the window to skip."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config, self.updates = model, model.config, 0

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
            out = self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
            if self.training and self.updates == skipped:
                out.loss = out.loss * math.inf
            return out

    overflowing, update = Overflowing(), TrainingLoop._update

    def counted(self: TrainingLoop, *given: Any) -> Any:
        outcome = update(self, *given)
        overflowing.updates += 1
        return outcome

    monkeypatch.setattr(TrainingLoop, "_update", counted)
    result = test_fine_tuning(
        overflowing, train_data=rows, optimizer=held, batch_size=1, gradient_accumulation_steps=steps, n_epochs=2,
        remainder="carry", validation_split=0.0, learning_rate_scaling=rule, lr_scheduler="cosine",
        warmup_steps=2, gradient_clip_norm=None, progress=False,
    )  # fmt: skip
    assert (result.skipped_steps, len(result.loss_history)) == (1, len(windows))
    assert result.lr_history == pytest.approx(rates, rel=1e-12)
    assert held.param_groups[0]["lr"] == 1e-3
    for (name, p), q in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.allclose(p, q[1], rtol=1e-9, atol=1e-12), name


def test_scaling_does_not_affect_a_schedule_that_reads_its_last_rate() -> None:
    """`MultiplicativeLR` and similar schedules read the rate that they set before, which must not be the scaled one."""
    from ftaccum.training.rates import scale_learning_rates

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda _: 0.5)
    seen = []
    for factor in (1.0, 4.0, 4.0):
        with scale_learning_rates(optimizer, factor):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
        schedule.step()
    assert seen == [1.0, 2.0, 1.0]


def test_a_tensor_learning_rate_is_recorded_as_a_number_and_restored(tmp_path: Path) -> None:
    model = BERT.model()
    held = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3))
    result = test_fine_tuning(
        model, train_data=BERT.rows(), optimizer=held, n_epochs=1, validation_split=0.0, output_dir=str(tmp_path),
        gradient_accumulation_steps="0:1,1:2", learning_rate_scaling="linear", progress=False,
    )  # fmt: skip
    assert Result.load(tmp_path).lr_history == result.lr_history == pytest.approx([1e-3, 1e-3], rel=1e-6)
    assert held.param_groups[0]["lr"] == torch.tensor(1e-3)


@pytest.mark.slow
def test_epochs_without_an_update_are_recorded_but_not_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With 4 rows an epoch and 10 an update, only the third, the fifth and the last epoch have an update."""
    result = test_fine_tuning(
        BERT.model(), train_data=BERT.rows(4), val_data=BERT.rows(3), n_epochs=6, batch_size=2,
        effective_batch_size=10, remainder="carry", early_stopping_patience=1, restore_best_weights=True,
        learning_rate=1e-2, output_dir=str(tmp_path), progress=False,
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    windows = [line for line in lines if "window" in line]
    epochs = [line for line in lines if "window" not in line and "evaluation" not in line and "audit" not in line]
    assert [(w["epoch"], w["rows"]) for w in windows] == [(2, 10), (4, 10), (5, 4)]
    assert [e["train_loss"] is None for e in epochs] == [True, True, False, True, False, False]
    assert result.evaluation_updates == [1, 2, 3]
    assert math.isnan(Result.load(tmp_path).train_loss_history[0])
    assert "2.5/6           1" in capsys.readouterr().out


def test_training_ends_after_max_updates_and_evaluates_there(tmp_path: Path) -> None:
    """16 rows, updates of 4: the sixth is in the middle of the second epoch."""
    result = test_fine_tuning(
        BERT.model(), train_data=BERT.rows(16), val_data=BERT.rows(3), n_epochs=5, max_updates=6, batch_size=4,
        learning_rate=1e-2, output_dir=str(tmp_path), progress=False,
    )  # fmt: skip
    assert (len(result.loss_history), len(result.val_loss_history)) == (6, 2)
    # A linear schedule without warm-up, over six updates rather than twenty.
    assert result.lr_history == pytest.approx([1e-2 * (6 - n) / 6 for n in range(6)])


def test_the_result_has_the_sizes_of_the_last_update_and_the_schedule(tmp_path: Path) -> None:
    result = test_fine_tuning(
        BERT.model(), train_data=BERT.rows(24), n_epochs=1, validation_split=0.0, batch_size=2,
        gradient_accumulation_steps=[(0, 1), (2, 4)], output_dir=str(tmp_path), progress=False,
    )  # fmt: skip
    assert (result.gradient_accumulation_steps, result.effective_batch_size) == (4, 8)
    assert result.accumulation_schedule == [[0, 1], [2, 4]]
    assert "5 of 2 to 8 rows, 0 skipped" in str(result)
    assert Result.load(tmp_path) == result
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [line["rows"] for line in lines if "window" in line] == [2, 2, 8, 8, 4]
