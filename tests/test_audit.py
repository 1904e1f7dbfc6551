"""Audits: gradients of actual updates are computed a second time and compared."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import IterableDataset
from torch import Tensor, nn

import silent_errors
from ftaccum import InexactLossError, InexactLossWarning, Result, test_fine_tuning
from ftaccum.accumulation.audit_rows import AuditRows
from ftaccum.accumulation.one_batch import OneBatch
from ftaccum.data.novelty import SeenValues
from ftaccum.objective.hidden_state import HiddenState
from ftaccum.objective.own_loss import OwnLoss
from ftaccum.objective.recount import RareCheck
from ftaccum.objective.report import ExactnessReport
from ftaccum.objective.rounding import Rounding
from ftaccum.objective.structure import ObservedPasses
from ftaccum.planning.audit_schedule import AuditSchedule, AuditSize
from heads import HEADS

ROWS = [
    (torch.randn(6, generator=torch.Generator().manual_seed(n)), torch.tensor(int(n % 5 in (0, 1, 4))))
    for n in range(24)
]
LLAMA = HEADS["causal LM, Llama"]
Loss = Callable[[Any, Any], Tensor]


class Net(nn.Module):
    """A classifier with dropout."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.3), *layers, nn.Linear(5, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


class Named(nn.Module):
    """A model of rows that are dicts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 9.0]).to(outputs))


def train(model: nn.Module, loss_fn: Loss = F.cross_entropy, **arguments: Any) -> Result:
    defaults: dict[str, Any] = {
        "train_data": ROWS, "batch_size": 2, "gradient_accumulation_steps": 4, "n_epochs": 2, "validation_split": 0.0,
    }  # fmt: skip
    return test_fine_tuning(model, loss_fn=loss_fn, progress=False, **defaults | arguments)


@pytest.fixture
def _without_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off all checks that would find a wrong gradient before an audit does."""

    def first_number(self: OwnLoss, outputs: Any, *, training: bool) -> Any:  # noqa: ARG001
        named = outputs.get("loss") if isinstance(outputs, dict) else getattr(outputs, "loss", None)
        return next(value for value in outputs if value.numel() == 1) if named is None else named

    monkeypatch.setattr(RareCheck, "recounts", lambda *_: {})
    monkeypatch.setattr(ExactnessReport, "inexact", lambda _: [])
    monkeypatch.setattr(ObservedPasses, "counts_before_changes", lambda *_: False)
    monkeypatch.setattr("ftaccum.objective.objective.refuse_other_counts", lambda *_: None)
    monkeypatch.setattr("ftaccum.objective.self_check.find_hidden_state", lambda *_: HiddenState())
    monkeypatch.setattr(OwnLoss, "__call__", first_number)


def audited(
    schedule: AuditSchedule, seconds: float = 1.0, trained: float = 0.0, new: tuple[int, ...] = ()
) -> list[int]:
    updates = []
    for update in range(1, schedule.n_updates + 1):
        is_planned = schedule.is_due(update)
        if is_planned or schedule.may_take(is_new=update in new):
            updates.append(update)
            schedule.done(seconds, is_planned=is_planned)
        schedule.trained += trained
    return updates


def test_long_runs_are_audited_at_powers_of_four() -> None:
    assert audited(AuditSchedule(True, 800)) == [1, 4, 16, 64]
    assert audited(AuditSchedule(True, 799)) == [1, 4, 16]


def test_short_runs_have_one_audit_or_two() -> None:
    assert audited(AuditSchedule(True, 532)) == [1, 266]
    assert audited(AuditSchedule(True, 16)) == [1, 8]
    assert audited(AuditSchedule(True, 15)) == [1]
    assert audited(AuditSchedule(True, 1)) == [1]


@pytest.mark.parametrize("n_updates", [16, 100, 1_000, 10_000])
def test_planned_audits_repeat_less_than_an_eighth_of_short_runs_and_little_of_long_ones(n_updates: int) -> None:
    first, *others = AuditSchedule(True, n_updates)._planned.values()
    assert first == AuditSize.FEW_ROWS
    assert set(others) == {AuditSize.WHOLE_WINDOW}
    assert 2 * len(others) / n_updates <= max(2 / n_updates, 0.0075)


def test_audits_continue_while_they_are_cheap() -> None:
    updates = audited(AuditSchedule(True, 4000), seconds=1.0, trained=1.0)
    assert len(updates) / 4000 == pytest.approx(0.005, rel=0.1)


def test_updates_with_new_values_are_audited_besides_the_planned_ones() -> None:
    late = tuple(range(100, 120))
    assert audited(AuditSchedule(True, 800), new=late) == [1, 4, 16, 64, *late[:8]]
    assert audited(AuditSchedule(True, 8), new=(1, 3, 5)) == [1, 3, 5]
    assert AuditSchedule(True, 800).size(1, is_new=True) == AuditSize.FEW_ROWS
    schedule = AuditSchedule(True, 800, spent=0.7, trained=100.0, extra=0)
    schedule._ahead = []
    assert schedule.size(9, is_new=True) == AuditSize.FEW_ROWS
    assert schedule.may_take(is_new=True)
    assert not schedule.may_take(is_new=False)


def windows_of_labels(*windows: list[float]) -> list[bool]:
    seen = SeenValues()
    return [seen.add([SimpleNamespace(batch=(None, torch.tensor(labels)))]) for labels in windows]  # type: ignore[list-item]


def test_label_values_that_first_appear_late_are_new() -> None:
    assert windows_of_labels([0, 1, 0, 1], [1, 1, 0, 0], [0, 2, 1, 0], [2, 2, 2, 2]) == [True, False, True, False]
    assert windows_of_labels([0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [50.0, 1.0, 1.0]) == [True, False, True]


def test_continuous_labels_are_not_new_after_the_first_window() -> None:
    assert windows_of_labels([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]) == [True, False, False]


def test_a_label_that_first_appears_late_in_a_stream_is_audited() -> None:
    rows = [(x, torch.tensor(2 if n >= 560 and n % 5 == 0 else n % 2)) for n, (x, _) in enumerate(ROWS * 30)]

    def late_weights(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 1.0, 9.0]).to(outputs))

    model = nn.Linear(6, 3)
    stream = IterableDataset.from_generator(
        lambda: ({"x": x, "labels": y} for x, y in ((x.tolist(), int(y)) for x, y in rows))
    )
    with pytest.raises(InexactLossError, match=r"Audit of update (7[0-9])"):
        train(
            Named(model), lambda outputs, batch: late_weights(outputs, batch["labels"]), train_data=stream,
            max_updates=80, on_inexact="error",
        )  # fmt: skip


def test_only_automatic_schedules_within_budget_consider_other_updates() -> None:
    assert AuditSchedule(True, 400).takes_others
    assert not AuditSchedule(3, 400).takes_others
    short = AuditSchedule(True, 8, extra=0)
    assert short.takes_others
    short.done(1.0, is_planned=True)
    assert not short.takes_others


def test_audits_can_run_every_n_updates() -> None:
    assert audited(AuditSchedule(3, 8)) == [1, 4, 7]
    assert audited(AuditSchedule(False, 8)) == []


def test_an_exact_run_reports_its_audits() -> None:
    result = train(Net(), audit=2)
    assert [audit["audit"] for audit in result.audits] == [1, 3, 5]
    assert all(audit["error"] <= audit["tolerance"] for audit in result.audits)
    assert all(audit["reference"] == "one batch" for audit in result.audits)
    assert "3 of 6 updates" in str(result)


def rows_of_audits(**arguments: Any) -> list[tuple[int, int]]:
    """Return the update and the number of rows of each audit in a run of four updates of six micro-batches."""
    result = train(Net(), **{"gradient_accumulation_steps": 6} | arguments)
    assert result.optimizer_steps == 4
    return [(audit["audit"], audit["rows"]) for audit in result.audits]


def test_the_first_audit_takes_a_few_rows() -> None:
    assert rows_of_audits() == [(1, 3)]
    assert rows_of_audits(batch_size=4, gradient_accumulation_steps=3) == [(1, 4)]
    assert rows_of_audits(batch_size=1, gradient_accumulation_steps=12) == [(1, 2)]


def test_a_few_rows_are_the_rarest_and_the_most_common_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    few, samples = AuditRows.few, []

    def recorded(*given: Any) -> AuditRows:
        samples.append(few(*given))
        return samples[-1]

    monkeypatch.setattr(AuditRows, "few", recorded)
    rows = [(x, torch.tensor(float(n == 13))) for n, (x, _) in enumerate(ROWS)]
    train(nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), F.mse_loss, train_data=rows, batch_size=4, n_epochs=1)
    (sample,) = [sample for sample in samples if 13 in sample.rows]
    assert [len(piece.rows) for piece in sample.by_process[0]] == [3, 1]
    assert [micro.batch[1].sum().item() for micro in sample.load()] == [1.0, 0.0]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_both_micro_batches_of_a_few_rows_have_loss_items(batch_size: int) -> None:
    rows = [{**row, "labels": row["input_ids"] if n % 4 else len(row["input_ids"]) * [-100]}
            for n, row in enumerate(LLAMA.rows(32))]  # fmt: skip
    arguments: dict[str, Any] = {
        "train_data": rows, "batch_size": batch_size, "effective_batch_size": 16, "n_epochs": 1,
        "validation_split": 0.0, "progress": False, "on_inexact": "ignore",
    }  # fmt: skip
    exact = test_fine_tuning(LLAMA.model().double(), **arguments)
    wrong = test_fine_tuning(
        LLAMA.model().double(),
        count_items=lambda batch: int((batch["labels"] != -100).any(1).sum()),
        **arguments,
    )
    assert 0 < exact.audits[0]["error"] < 1e-6
    assert wrong.audits[0]["error"] > 1e-3


def test_audits_of_every_nth_update_take_whole_windows_after_the_first() -> None:
    assert rows_of_audits(audit=2) == [(1, 3), (3, 12)]


@pytest.mark.parametrize(("least", "n_measured"), [(1e-6, 0), (0.0, 1)])
def test_rounding_is_measured_only_above_the_least_tolerance(
    monkeypatch: pytest.MonkeyPatch, least: float, n_measured: int
) -> None:
    gradient, n_batches = OneBatch.gradient, 0

    def counted(*given: Any) -> Any:
        nonlocal n_batches
        n_batches += 1
        return gradient(*given)

    monkeypatch.setattr(OneBatch, "gradient", counted)
    monkeypatch.setattr(Rounding, "of", lambda *_: Rounding(least, 1e-3))
    (audit,) = train(Net(), train_data=ROWS[:8], n_epochs=1).audits
    assert 1e-9 < audit["error"] < 1e-6
    assert n_batches == 1 + n_measured


def test_audits_do_not_change_the_run() -> None:
    results, weights = [], []
    for audit in (False, 2):
        model = Net(nn.LayerNorm(5))
        model.register_buffer("steps", torch.zeros(()))
        results.append(train(model, audit=audit))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)
    assert results[0].loss_history == results[1].loss_history
    assert results[0].grad_norm_history == results[1].grad_norm_history


class Centred(nn.Module):
    """A loss that depends on a running average in a buffer."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(2))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs - self.centre.clone(), targets)
        self.centre.mul_(0.9).add_(outputs.detach().mean(0), alpha=0.1)
        return loss


def test_audits_do_not_change_the_buffers_of_the_loss() -> None:
    found = []
    for audit in (False, 2):
        model, loss_fn = Net(), Centred()
        train(model, loss_fn, audit=audit, on_inexact="ignore")
        found.append(torch.cat([*(p.detach().flatten() for p in model.parameters()), loss_fn.centre]))
    assert torch.equal(*found)


@pytest.mark.usefixtures("_without_rules")
def test_audits_find_class_weights_that_measurements_missed() -> None:
    with pytest.raises(InexactLossError, match=r"Audit of update 1.*The losses differ as well.*count_items") as raised:
        train(Net(), weighted, on_inexact="error")
    assert "0 updates" in str(raised.value)


@pytest.mark.usefixtures("_without_rules")
def test_findings_are_reported_once_and_counted() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train(Net(), weighted, audit=2)
    assert len([w for w in caught if w.category is InexactLossWarning]) == 1
    assert "3 NOT exact" in str(result)


@pytest.mark.usefixtures("_without_rules")
def test_findings_can_be_ignored() -> None:
    result = train(Net(), weighted, audit=2, on_inexact="ignore")
    assert min(audit["error"] for audit in result.audits) > 0.01


def late(model: nn.Module) -> Loss:
    """Return a loss that has class weights after the first change of a weight."""
    start = model.layers[0].weight.detach().clone()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        moved = not torch.equal(model.layers[0].weight, start)
        return weighted(outputs, targets) if moved else F.cross_entropy(outputs, targets)

    return loss


def test_an_audit_that_stops_a_run_loses_no_update(tmp_path: Path) -> None:
    model = Net()
    arguments = {"output_dir": str(tmp_path), "audit": 2, "learning_rate": 0.01}
    with pytest.raises(
        InexactLossError, match=r"Audit of update 3(.|\n)*after 2 updates is in(.|\n)*newest checkpoint"
    ):
        train(model, late(model), on_inexact="error", **arguments)
    assert (tmp_path / "model" / "model.safetensors").exists()
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [line["window"] for line in lines if "window" in line] == [0, 1]
    assert [line["audit"] for line in lines if "audit" in line] == [1, 3]
    fresh = Net()
    result = train(fresh, late(fresh), on_inexact="ignore", resume="auto", allow_changed=["loss_fn"], **arguments)
    assert result.optimizer_steps == 6
    assert [audit["audit"] for audit in result.audits] == [1, 3, 3, 5]


@pytest.mark.usefixtures("_without_rules")
def test_the_reference_is_another_cut_if_one_batch_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftaccum.accumulation.one_batch.free_memory", lambda _: 0)
    result = train(Net())
    assert {audit["reference"] for audit in result.audits} == {"another cut"}
    assert all(audit["error"] <= audit["tolerance"] for audit in result.audits)
    with pytest.raises(InexactLossError, match="in other micro-batches"):
        train(Net(), weighted, on_inexact="error")


FOUND = {
    1: "`loss_fn` sets padded labels to -100",
    6: "class weights in a function of the user's own, of a rare class",
    7: "255 ignored in a lambda",
    9: "a layer that normalizes its gradient",
    10: "a mean over losses above 0.02, which shrink",
    11: "the same, one row at a time",
    12: "the same in train mode alone",
}


@pytest.mark.usefixtures("_without_rules")
@pytest.mark.parametrize("kind", FOUND)
def test_audits_find_errors_that_no_rule_covers(kind: int) -> None:
    (case,) = (case for case in silent_errors.all_cases() if (case.kind, case.name) == (kind, FOUND[kind]))
    with pytest.raises(InexactLossError, match=r"Audit of update \d+"):
        case.run()


@pytest.mark.slow
def test_padded_rows_packed_rows_and_a_growing_k_are_audited() -> None:
    for arguments in (
        {},
        {"padding_free": True},
        {"gradient_accumulation_steps": [(0, 1), (2, 3)]},
        {"num_workers": 1},
    ):
        model = LLAMA.model()
        result = test_fine_tuning(
            model, train_data=LLAMA.rows(12), audit=2, validation_split=0.0, progress=False, on_inexact="error",
            **{"batch_size": 2, "gradient_accumulation_steps": 2} | arguments,
        )  # fmt: skip
        assert len(result.audits) >= 3
        assert max(audit["error"] for audit in result.audits) < 1e-6


def test_streams_are_audited() -> None:
    rows = LLAMA.rows(12)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    result = test_fine_tuning(
        LLAMA.model(), train_data=stream, max_updates=4, batch_size=2, gradient_accumulation_steps=2, audit=2,
        validation_split=0.0, progress=False, on_inexact="error",
    )  # fmt: skip
    assert [audit["audit"] for audit in result.audits] == [1, 3]


def test_audits_do_not_report_batch_norm() -> None:
    model = Net(nn.BatchNorm1d(5))
    with pytest.warns(InexactLossWarning) as caught:
        train(model, audit=2)
    assert len(caught) == 1
    assert "Audit" not in str(caught[0].message)


def test_rows_with_their_own_random_generator_are_not_audited() -> None:
    class Noisy(torch.utils.data.Dataset):
        draw = np.random.default_rng(0)

        def __len__(self) -> int:
            return len(ROWS)

        def __getitem__(self, n: int) -> tuple[Tensor, Tensor]:
            return ROWS[n][0] + float(self.draw.normal()), ROWS[n][1]

    assert train(Net(), train_data=Noisy()).audits == []


@pytest.mark.slow
def test_two_processes_run_the_same_audits(two_processes: Callable[..., str]) -> None:
    assert two_processes("audits.py").count("audited") == 2
