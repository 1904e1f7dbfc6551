"""Losses and gradients that are not finite: the update is skipped, bad rows are named, and repetition ends the run."""

import json
import math
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftaccum import DivergedError, Result, plan, test_fine_tuning
from heads import HEADS
from training_passes import is_training_pass

ROWS, BAD = 24, 13  # a row that no check before training examines
Row = tuple[Tensor, int]


class Normed(nn.Module):
    """A model with batch norm, whose statistics would keep a NaN, and dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.drop, self.head = nn.BatchNorm1d(4), nn.Dropout(dropout), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(x)))


def points(bad: Sequence[int] = (BAD,), value: float = math.nan) -> list[Row]:
    draw = torch.Generator().manual_seed(3)
    rows = [(torch.randn(4, generator=draw, dtype=torch.float64), n % 3) for n in range(ROWS)]
    for n in bad:
        rows[n][0][1] = value
    return rows


def run(model: nn.Module, rows: Any, **arguments: Any) -> Result:
    defaults: dict[str, Any] = {
        "batch_size": 3, "effective_batch_size": 9, "n_epochs": 1, "validation_split": 0.0, "planner": False,
        "lr_scheduler": "constant", "learning_rate": 0.1, "gradient_clip_norm": None, "on_inexact": "ignore",
        "optimizer": lambda groups: torch.optim.SGD(groups), "loss_fn": nn.CrossEntropyLoss(), "progress": False,
    }  # fmt: skip
    return test_fine_tuning(model, train_data=rows, **(defaults | arguments))


def infinite_rows() -> list[dict[str, Any]]:
    """Return rows with a number that is added to their loss. It has no gradient and is infinite in one row."""
    return [{"x": x, "labels": y, "added": math.inf if n == BAD else 0.0} for n, (x, y) in enumerate(points(()))]


def infinite_loss(logits_BC: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(logits_BC, batch["labels"]) + batch["added"].mean()


def windows(n_epochs: int = 1) -> list[tuple[int, ...]]:
    planned = plan(ROWS, batch_size=3, effective_batch_size=9, n_epochs=n_epochs, validation_split=0.0)
    return [window.rows for epoch in planned.epochs for window in planned.windows(epoch)]


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("Update ")]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_window_with_a_bad_row_has_no_effect(value: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights and running statistics equal those of a plain loop without the window. A remainder follows it."""
    rows, plain = points(value=value), Normed()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    (skipped,) = (n for n, window in enumerate(windows()) if BAD in window)
    for window in (window for window in windows() if BAD not in window):
        for part in (window[start : start + 3] for start in range(0, len(window), 3)):
            x, y = torch.stack([rows[n][0] for n in part]), torch.tensor([rows[n][1] for n in part])
            (nn.functional.cross_entropy(plain(x), y) * len(part) / len(window)).backward()
        optimizer.step()
        optimizer.zero_grad()

    model = Normed()
    result = run(model, rows, weight_decay=0.0)
    assert (result.optimizer_steps, result.skipped_steps) == (2, 1)
    assert math.isnan(result.loss_history[skipped])
    for (name, found), wanted in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-14), name
    assert told(capsys) == [
        f"Update {skipped + 1} is skipped: its loss is nan. Rows whose own loss is not finite: row {BAD} of "
        "`train_data` (nan)."
    ]


def test_a_skipped_update_restores_the_whole_state_bit_for_bit() -> None:
    model = Normed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    momentum = torch.optim.AdamW(model.parameters(), lr=0.1)
    result = run(model, points(), effective_batch_size=ROWS, optimizer=momentum)
    assert (result.optimizer_steps, result.skipped_steps) == (0, 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not momentum.state


def test_an_infinite_loss_skips_the_update_even_if_the_gradient_is_finite(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The message names the row by its position in `train_data`, held-out rows included."""

    result = run(Normed(), infinite_rows(), loss_fn=infinite_loss, validation_split=0.25, output_dir=str(tmp_path))
    assert result.skipped_steps == 1
    assert all(map(math.isfinite, result.grad_norm_history))
    (line,) = told(capsys)
    assert line.endswith(f"its loss is inf. Rows whose own loss is not finite: row {BAD} of `train_data` (inf).")
    entries = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [e["loss"] is None for e in entries if "skipped" in e] == [e["skipped"] for e in entries if "skipped" in e]


def test_a_finite_term_of_a_loss_does_not_hide_a_nonfinite_one(capsys: pytest.CaptureFixture[str]) -> None:
    """This holds for the loss history and for evaluation."""

    def loss(logits_BC: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        added = batch["added"].mean() * 0  # infinity times 0 is NaN
        return {"of classes": nn.functional.cross_entropy(logits_BC, batch["labels"]), "added": added}

    result = run(Normed(), infinite_rows(), val_data=infinite_rows(), loss_fn=loss)
    assert [math.isnan(found) for found in result.loss_history] == [BAD in window for window in windows()]
    assert math.isnan(result.final_loss)
    assert "its loss is nan" in told(capsys)[0]


class _Overflows(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * math.inf


def overflowing(updates: Sequence[int]) -> tuple[nn.Module, Any]:
    """Return a model and a loss whose gradient overflows in these updates (from 1), of one pass each."""
    model, passes = Normed(), iter(range(1, 10**6))

    def loss(logits_BC: Tensor, labels: Tensor) -> Tensor:
        found = nn.functional.cross_entropy(logits_BC, labels)
        return _Overflows.apply(found) if is_training_pass() and next(passes) in updates else found

    return model, loss


def test_a_gradient_that_overflows_while_the_loss_is_finite_names_no_row(capsys: pytest.CaptureFixture[str]) -> None:
    model, loss = overflowing([2])
    result = run(model, points(()), loss_fn=loss, batch_size=9)
    assert result.skipped_steps == 1
    assert all(map(math.isfinite, result.loss_history))
    (line,) = told(capsys)
    assert re.fullmatch(
        r"Update 2 is skipped: the norm of its gradient is (nan|inf), but its loss, [\d.]+, is finite\. "
        r"The fault is in the backward pass, so no row can be named\.",
        line,
    )


def test_consecutive_skipped_updates_end_the_run_and_are_all_in_the_ledger(tmp_path: Path) -> None:
    """After two skipped updates comes a finite one, then three more: only consecutive ones count."""
    model, loss = overflowing([2, 3, 5, 6, 7])
    with pytest.raises(
        DivergedError,
        match=r"^Update 7 is skipped: .* The number of such updates in a row has reached 3, "
        r"so the run ends \(`nonfinite_patience`\)\. "
        r"Lower `learning_rate` or `gradient_clip_norm`, or lengthen the warm-up\.$",
    ) as raised:
        run(
            model, points(()), loss_fn=loss, batch_size=2, effective_batch_size=2, nonfinite_patience=3,
            output_dir=str(tmp_path),
        )  # fmt: skip
    assert (raised.value.update, raised.value.rows) == (7, ())
    entries = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [e["skipped"] for e in entries if "skipped" in e] == [False, True, True, False, True, True, True]


def test_the_first_skipped_update_ends_the_run_if_on_nonfinite_is_error(tmp_path: Path) -> None:
    model, last = Normed(), next(n for n, window in enumerate(windows()) if BAD in window)
    with pytest.raises(
        DivergedError,
        match=r"\(nan\)\. The run ends here because `on_nonfinite` is 'error'\. Fix or drop these rows\.$",
    ) as raised:
        run(model, points(), on_nonfinite="error", output_dir=str(tmp_path))
    assert (raised.value.update, raised.value.rows) == (last + 1, (f"row {BAD} of `train_data`",))
    assert pickle.loads(pickle.dumps(raised.value)).rows == raised.value.rows
    entries = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [e["skipped"] for e in entries if "skipped" in e] == [False] * last + [True]
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_log_is_not_flooded(capsys: pytest.CaptureFixture[str]) -> None:
    model, loss = overflowing(range(1, 100))
    result = run(
        model, points(()), loss_fn=loss, batch_size=2, effective_batch_size=2, n_epochs=6, nonfinite_patience=None
    )
    assert result.skipped_steps == 72
    lines = told(capsys)
    assert [int(re.findall(r"\d+", line)[0]) for line in lines] == [*range(1, 11), 16, 32, 64]
    assert [
        line for line in lines if line.endswith("From now on, only the 16th, the 32nd and so on are reported.")
    ] == [lines[9]]


def test_rows_that_are_bad_only_together_are_reported_as_one_micro_batch(capsys: pytest.CaptureFixture[str]) -> None:
    """A loss that cannot be computed for a single row does not end the run."""

    def loss(logits_BC: Tensor, batch: dict[str, Tensor]) -> Tensor:
        if model.looked and len(logits_BC) == 1:
            raise ValueError("more than one row, please")
        model.looked = model.looked or is_training_pass()
        found = nn.functional.cross_entropy(logits_BC, batch["labels"])
        return found * math.nan if BAD in batch["n"] else found

    model = Normed()
    model.looked = False
    rows = [{"x": x, "labels": y, "n": n} for n, (x, y) in enumerate(points(()))]
    run(model, rows, loss_fn=loss)
    pass_ = next(w[s : s + 3] for w in windows() for s in range(0, len(w), 3) if BAD in w[s : s + 3])
    (line,) = told(capsys)
    names = [f"row {n} of `train_data`" for n in pass_]
    assert line.endswith(
        "its loss is nan, but no row has a non-finite loss when run separately. A micro-batch whose loss "
        "was not finite contains "
        f"{', '.join(names[:-1])} and {names[-1]}."
    )


def test_a_dummy_micro_batch_is_not_reported_as_a_bad_row(capsys: pytest.CaptureFixture[str]) -> None:
    """Only one of three rows has a label. It serves as the dummy in the windows of the others."""
    head = HEADS["token classification, BERT"]
    model, trained = head.model(), []
    rows = [{**row, "labels": [-100] * len(row["labels"])} if n else row for n, row in enumerate(head.rows(3))]

    def poison(_: nn.Module, __: Any, outputs: Any) -> None:
        trained.append(is_training_pass())
        outputs.loss = outputs.loss * (math.nan if any(trained) else 1)

    model.register_forward_hook(poison)
    run(model, rows, loss_fn=None, batch_size=1, effective_batch_size=1)
    lines = sorted(line.partition("its loss is ")[2] for line in told(capsys))
    assert lines == [
        "nan, but no row has a non-finite loss when run separately.",
        "nan, but no row has a non-finite loss when run separately.",
        "nan. Rows whose own loss is not finite: row 0 of `train_data` (nan).",
    ]


def test_weights_that_are_not_finite_are_not_blamed_on_rows(capsys: pytest.CaptureFixture[str]) -> None:
    class Breaking(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            self.param_groups[0]["params"][0].data.fill_(math.nan)

    run(Normed(), points(()), optimizer=lambda groups: Breaking(groups))
    first, _ = told(capsys)
    assert "and 1 more. These are all the rows" not in first
    assert re.search(
        r"row \d+ of `train_data` \(nan\)\. These are all the rows that were run, so the weights may not be finite",
        first,
    )
    assert first.count("row ") == 8  # the search stops there


@pytest.mark.parametrize("arguments", [{}, {"padding_free": True}, {"planner": False}])
def test_a_bad_row_is_found_in_any_batch_layout(arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    head = HEADS["causal LM, Llama"]
    model, rows, trained = head.model(), head.rows(14), []
    for n, row in enumerate(rows):
        row["input_ids"] = [min(token, 59) for token in row["input_ids"]]
        row["input_ids"][0] = 60 if n == 11 else row["input_ids"][0]

    def poison(_: nn.Module, __: Any, given: dict[str, Any], outputs: Any) -> None:
        trained.append(is_training_pass())
        if any(trained) and (given["input_ids"] == 60).any():
            outputs.loss = outputs.loss * math.nan

    model.register_forward_hook(poison, with_kwargs=True)
    run(model, rows, loss_fn=None, batch_size=7, effective_batch_size=14, n_epochs=1, **arguments)
    assert told(capsys) == [
        "Update 1 is skipped: its loss is nan. Rows whose own loss is not finite: row 11 of `train_data` (nan)."
    ]


def test_looking_for_bad_rows_changes_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a skipped update, the dropout draws continue as if no row had been examined."""
    looked, not_looked = Normed(0.5), Normed(0.5)
    run(looked, points(), n_epochs=2)
    monkeypatch.setattr("ftaccum.training.build_run.NonFiniteHandler.window_done", lambda *_: None)
    run(not_looked, points(), n_epochs=2)
    assert all(
        torch.equal(*pair) for pair in zip(looked.state_dict().values(), not_looked.state_dict().values(), strict=True)
    )
    assert looked.training == not_looked.training


class TestOverflowInFp16:
    """Overflow in fp16, which is expected in the first updates until the loss scale has fallen."""

    def run(self, factor: float, **arguments: Any) -> Result:
        model, self.trained, self.looked = HEADS["sequence classification, BERT"].model().float(), False, 0

        def watch(model: nn.Module, _: Any) -> None:
            self.trained |= is_training_pass()
            self.looked += self.trained and not model.training

        model.register_forward_pre_hook(watch)
        return run(
            model, HEADS["sequence classification, BERT"].rows(8), mixed_precision="fp16", batch_size=4,
            effective_batch_size=4, n_epochs=20, audit=False,
            loss_fn=lambda outputs, batch: factor * nn.functional.cross_entropy(outputs.logits, batch["labels"]),
            **arguments,
        )  # fmt: skip

    def test_logs_one_line_and_raises_no_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        result = self.run(100.0, on_nonfinite="error", learning_rate=1e-6)
        updates = [n for n, norm in enumerate(result.grad_norm_history, 1) if not math.isfinite(norm)]
        assert 3 <= len(updates) <= 10
        assert told(capsys) == [
            f"Update {update} is skipped: its gradient overflowed in fp16. The loss scale is now {2 ** (16 - n)}."
            for n, update in enumerate(updates, 1)
        ]
        assert self.trained
        assert not self.looked, "for rows"

    def test_ends_the_run_if_it_does_not_stop(self) -> None:
        with pytest.raises(
            DivergedError, match=r"updates in a row has reached 4.*, or use `mixed_precision='bf16'`, which"
        ) as raised:
            self.run(1e9, nonfinite_patience=4)
        assert raised.value.update == 4


def test_buffers_that_start_to_change_later_are_protected_from_nan() -> None:
    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)
            self.register_buffer("passes", torch.zeros(()))
            self.register_buffer("average", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training and is_training_pass():
                self.passes += 1
                if self.passes > 3:
                    self.average.lerp_(x.mean(0), 0.5)
            return self.layer(x) + 0 * self.average

    rows = [(torch.ones(1) * (math.nan if n == 5 else n), torch.zeros(1)) for n in range(12)]
    model = Average()
    result = test_fine_tuning(
        model, train_data=rows, loss_fn=nn.MSELoss(), n_epochs=1, batch_size=1, effective_batch_size=1,
        validation_split=0.0, progress=False, on_inexact="ignore",
    )  # fmt: skip
    assert result.skipped_steps == 1
    assert math.isfinite(model.average)
