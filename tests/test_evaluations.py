"""When runs are evaluated, which evaluation is the best, and what follows from it."""

import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, TrainerCallback

from ftaccum import SettingsError, test_fine_tuning
from ftaccum.checkpoint.manager import CheckpointManager
from ftaccum.planning.batch_size import BatchSizes
from ftaccum.planning.evaluation_schedule import EvaluationSchedule
from ftaccum.planning.plan import Plan
from ftaccum.tracking.ledger import EvaluationEntry
from ftaccum.tracking.selection import Criterion, infer_greater_is_better
from interrupted import CLASSIFIER, CutOff, checkpoints_of, fine_tuned, ledger_of


def evaluated_after(schedule: EvaluationSchedule, plan: Plan) -> list[int]:
    found, last = [], 0
    for n_updates in range(1, plan.n_windows + 1):
        if schedule.is_due(n_updates, last):
            found.append(n_updates)
            last = n_updates
    return found


def plan_of(n_rows: int, n_epochs: int, batch: int, **options: Any) -> Plan:
    return Plan(n_rows, n_epochs, BatchSizes(1, batch, 1, batch), **options)


def test_evaluations_are_due_every_few_updates() -> None:
    plan = plan_of(30, 2, 8)  # 8 updates
    assert evaluated_after(EvaluationSchedule.every_updates(3), plan) == [3, 6]
    assert evaluated_after(EvaluationSchedule(), plan) == []


@pytest.mark.parametrize(
    ("share", "remainder", "expected"),
    [
        (0.25, "flush", [1, 2, 3, 4, 5, 6, 7, 8]),
        (0.5, "flush", [2, 4, 6, 8]),
        (1.0, "flush", [4, 8]),
        (0.3, "flush", [2, 3, 4, 5, 6, 7]),  # 9, 18, 27, 36, 45 and 54 of 60 rows
        (0.5, "carry", [2, 4, 6, 8]),
        (1.0, "carry", [4, 8]),  # 30 of 60 rows are done after the fourth update of 8
    ],
)
def test_evaluations_are_due_after_shares_of_an_epochs_rows(share: float, remainder: str, expected: list[int]) -> None:
    plan = plan_of(30, 2, 8, remainder=remainder)
    assert evaluated_after(EvaluationSchedule.every_share(share, 30, plan.rows_after), plan) == expected


def test_a_tenth_of_an_epoch_is_not_late_because_of_rounding() -> None:
    plan = plan_of(30, 1, 1)
    schedule = EvaluationSchedule.every_share(0.1, 30, plan.rows_after)
    assert evaluated_after(schedule, plan) == list(range(3, 31, 3))


def evaluations(*values: float, metric: str | None = None) -> list[EvaluationEntry]:
    metrics = [{} if metric is None else {metric: value} for value in values]
    losses = values if metric is None else [1.0] * len(values)
    found = enumerate(zip(losses, metrics, strict=True))
    return [EvaluationEntry(n, 0, n, 1.0, loss, named) for n, (loss, named) in found]


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ((0.0, 3.0, 2.0, 2.0), 2),  # the first entry is the evaluation before training
        ((0.0, math.nan, math.inf, -math.inf), None),
        ((0.0, math.inf, 5.0), 2),
        ((0.0,), None),
    ],
)
def test_the_best_evaluation_has_the_lowest_finite_loss(values: tuple[float, ...], best: int | None) -> None:
    found = Criterion().best(evaluations(*values))
    assert (found and found.evaluation) == best


def test_greater_values_of_a_metric_can_be_better() -> None:
    criterion = Criterion.of_settings("macro_f1", None)
    best = criterion.best(evaluations(9.0, 0.5, math.nan, 0.7, 0.7, math.inf, metric="macro_f1"))
    assert best is not None
    assert best.evaluation == 3


def test_small_improvements_add_up_before_they_count_as_one() -> None:
    criterion = Criterion(min_delta=0.5)
    assert criterion.n_without_improvement(evaluations(9, 3.0, 2.8, 2.6)) == 2
    assert criterion.n_without_improvement(evaluations(9, 3.0, 2.8, 2.6, 2.4)) == 0  # 0.6 better than 3.0
    assert criterion.n_without_improvement(evaluations(9, math.inf, math.nan, math.inf)) == 3


@pytest.mark.parametrize(
    ("name", "greater"),
    [
        ("accuracy", True), ("eval_f1", True), ("rougeL", True), ("exact_match", True), ("mse", False), ("wer", False),
        ("masked_loss", False), ("f1_loss", None), ("log_loss", False), ("neg_log_loss", None), ("1-wer", None),
        ("accuracy_drop", None), ("perplexity", False), ("quality", None), ("macro", None),
    ],
)  # fmt: skip
def test_the_direction_of_known_metrics_is_inferred(name: str, greater: bool | None) -> None:
    assert infer_greater_is_better(name) is greater


def score(predictions: EvalPrediction) -> dict[str, float]:
    logits: Any = predictions.predictions
    return {"accuracy": float((logits.argmax(-1) == predictions.label_ids).mean()), "spread": float(np.std(logits))}


def test_a_run_is_evaluated_within_epochs_and_at_its_end() -> None:
    every, plain = fine_tuned(evaluate_every=4, compute_metrics=score), fine_tuned()
    result = every.result
    assert result.evaluation_updates == [4, 8, 12, 14]
    assert [len(found) for found in (result.val_loss_history, result.metrics, result.train_loss_history)] == [4, 4, 2]
    assert result.final_loss == result.val_loss_history[-1] == plain.result.final_loss
    assert [name for name, t in plain.weights.items() if not torch.equal(t, every.weights[name])] == []


@pytest.mark.slow
def test_a_share_of_an_epoch_is_read_from_text() -> None:
    result = fine_tuned(evaluate_every="50%", n_epochs=1).result
    assert result.evaluation_updates == [4, 7]


@pytest.mark.slow
def test_the_training_loss_of_an_evaluation_is_the_mean_since_the_previous_one(tmp_path: Path) -> None:
    import json

    result = fine_tuned(evaluate_every=3, output_dir=str(tmp_path), max_updates=7).result
    entries = [json.loads(line) for line in ledger_of(tmp_path).splitlines()]
    found = [entry["train_loss"] for entry in entries if "evaluation" in entry]
    rows, losses = [8] * 6 + [6], result.loss_history
    means = [np.average(losses[a:b], weights=rows[a:b]) for a, b in ((0, 3), (3, 6), (6, 7))]
    assert found[0] is None
    assert found[1:] == pytest.approx(means, rel=1e-6)


def test_the_best_weights_by_a_metric_are_restored() -> None:
    run = fine_tuned(
        evaluate_every=2, compute_metrics=score, metric_for_best="spread", greater_is_better=False,
        restore_best_weights=True, learning_rate=0.05,
    )  # fmt: skip
    result = run.result
    spreads = [found["spread"] for found in result.metrics]
    best = int(np.argmin(spreads))
    assert result.best_update == result.evaluation_updates[best] < 14
    again = CLASSIFIER.model().float()
    again.load_state_dict({name: t for name, t in run.weights.items() if name in again.state_dict()})
    after = test_fine_tuning(
        again, train_data=CLASSIFIER.rows(60), n_epochs=1, learning_rate=1e-12, compute_metrics=score, progress=False
    )
    assert after.initial_loss == pytest.approx(result.val_loss_history[best], rel=1e-6)


def test_early_stopping_counts_evaluations_and_ends_within_an_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    run = fine_tuned(evaluate_every=1, early_stopping_patience=2, early_stopping_min_delta=1e6, n_epochs=4)
    assert run.result.evaluation_updates == [1, 2, 3]
    assert (run.result.optimizer_steps, len(run.result.train_loss_history)) == (3, 1)
    assert "Stopped early: no better validation loss in 2 evaluations." in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_stopped_early_stays_ended_when_it_is_resumed(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "evaluate_every": 1, "early_stopping_patience": 2, "early_stopping_min_delta": 1e6,
        "restore_best_weights": True, "output_dir": str(tmp_path), "checkpoint_every": 1,
    }  # fmt: skip
    whole = fine_tuned(**arguments)
    assert whole.differences(fine_tuned(**arguments, resume="auto")) == []


@pytest.mark.slow
def test_a_run_resumes_between_evaluations_to_the_last_bit(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "evaluate_every": 4, "compute_metrics": score, "metric_for_best": "accuracy", "restore_best_weights": True,
        "early_stopping_patience": 9, "checkpoint_every": 1,
    }  # fmt: skip
    whole = fine_tuned(**arguments, output_dir=str(tmp_path / "whole"))
    with pytest.raises(CutOff):
        fine_tuned(cut_off_at=9, **arguments, output_dir=str(tmp_path / "cut"))
    assert whole.differences(fine_tuned(**arguments, output_dir=str(tmp_path / "cut"), resume="auto")) == []
    assert ledger_of(tmp_path / "cut") == ledger_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_longer_run_does_not_keep_the_evaluation_at_the_end_of_a_shorter_one(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"evaluate_every": 4, "lr_scheduler": "constant"}
    fine_tuned(max_updates=6, output_dir=str(tmp_path), **arguments)
    extended = fine_tuned(output_dir=str(tmp_path), resume="auto", allow_changed="max_updates", **arguments)
    assert set(extended.differences(fine_tuned(**arguments))) <= {"audits"}  # whose number depends on the time


@pytest.mark.slow
def test_the_checkpoint_of_the_best_evaluation_is_kept(tmp_path: Path) -> None:
    with patch.object(CheckpointManager, "finish", lambda *_, **__: None):  # as if the run was killed at its end
        run = fine_tuned(
            evaluate_every=2, compute_metrics=score, metric_for_best="spread", greater_is_better=False,
            learning_rate=0.05, output_dir=str(tmp_path), keep_checkpoints=1, checkpoint_every=None,
        )  # fmt: skip
    assert f"update-{run.result.best_update:08d}" in checkpoints_of(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"evaluate_every": 0}, "`evaluate_every` must be a positive number of updates, or a share of an epoch"),
        ({"evaluate_every": 1.5}, "`evaluate_every` must be a positive number of updates"),
        ({"evaluate_every": "0%"}, "`evaluate_every` must be a positive number of updates"),
        ({"evaluate_every": True}, "`evaluate_every` must be a positive number of updates"),
        ({"evaluate_every": 2, "validation_split": 0.0}, "`evaluate_every` needs validation rows"),
        ({"metric_for_best": "accuracy"}, "but `compute_metrics` is None, so only the validation loss is known"),
        ({"metric_for_best": "spread", "compute_metrics": score}, "its name does not tell whether greater values"),
        ({"metric_for_best": "f1", "compute_metrics": score}, "Choose one of: val_loss, accuracy, spread."),
        ({"greater_is_better": True}, "`metric_for_best` is the validation loss, which is better if lower"),
        ({"early_stopping_min_delta": 0.1}, "`early_stopping_patience` is None, so training never stops early"),
    ],
)
def test_settings_of_evaluations_are_checked_before_training(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        fine_tuned(**arguments)


def test_a_metric_that_is_unknown_costs_nothing_of_an_earlier_run(tmp_path: Path) -> None:
    fine_tuned(output_dir=str(tmp_path), n_epochs=1, compute_metrics=score)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for more in ({}, {"resume": "auto", "allow_changed": ["metric_for_best", "greater_is_better", "n_epochs"]}):
        with pytest.raises(SettingsError, match="Choose one of: val_loss, accuracy, spread"):
            fine_tuned(
                output_dir=str(tmp_path), compute_metrics=score, metric_for_best="nope", greater_is_better=True, **more
            )
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_the_smallest_share_of_an_epoch_evaluates_after_each_update() -> None:
    assert fine_tuned(evaluate_every=1e-12, max_updates=3).result.evaluation_updates == [1, 2, 3]


class Noisy(torch.nn.Module):
    """A layer with dropout, whose outputs are also random in an evaluation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.nn.functional.dropout(x_BD, 0.5))


def points(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(3, generator=draw), torch.randint(2, (), generator=draw)) for _ in range(n)]


def trained_on_points(model: torch.nn.Module, loss_fn: Any = None, **options: Any) -> Any:
    given = {"n_epochs": 1, "progress": False, "audit": False, "loss_fn": loss_fn or torch.nn.CrossEntropyLoss()}
    return test_fine_tuning(model, train_data=points(12), val_data=points(20)[12:], **given | options)


def test_models_and_metrics_that_draw_random_numbers_do_not_change_the_training() -> None:
    def drawing(_: EvalPrediction) -> dict[str, float]:
        return {"drawn": torch.rand(()).item() + np.random.rand()}

    rare, often = Noisy(), Noisy()
    trained_on_points(rare)
    result = trained_on_points(often, evaluate_every=1, compute_metrics=drawing)
    assert torch.equal(rare.layer.weight, often.layer.weight)
    assert len({metrics["drawn"] for metrics in result.metrics}) == 1


def test_a_metric_that_later_evaluations_lack_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = iter([{"accuracy": 0.5}, {"accuracy": 0.6}, {}, {"accuracy": 0.1}])
    options = {"evaluate_every": 1, "metric_for_best": "accuracy", "verbosity": "quiet"}
    result = trained_on_points(Noisy(), compute_metrics=lambda _: next(metrics), **options)
    assert result.best_update == 1
    assert "returned no 'accuracy' after update 2, so this evaluation cannot be the best" in capsys.readouterr().err


class Scaled(torch.nn.Module):
    """A loss with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, logits_BC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.scale * logits_BC, labels_B)


def test_the_weights_of_a_loss_are_restored_with_those_of_the_model() -> None:
    torch.manual_seed(0)
    model, loss_fn = torch.nn.Linear(3, 2), Scaled()
    optimizer = torch.optim.SGD([*model.parameters(), *loss_fn.parameters()], lr=5.0)
    options = {"optimizer": optimizer, "restore_best_weights": True, "lr_scheduler": "constant", "n_epochs": 3}
    result = trained_on_points(model, loss_fn, **options)
    inputs, labels = (torch.stack(column) for column in zip(*points(20)[12:], strict=True))
    assert result.best_val_loss is not None
    assert result.best_val_loss < result.final_loss
    assert loss_fn(model(inputs), labels).item() == pytest.approx(result.best_val_loss, rel=1e-6)


def test_a_metric_named_as_the_validation_loss_does_not_take_its_place() -> None:
    seen: list[dict[str, float]] = []

    class Seer(TrainerCallback):
        def on_evaluate(self, *_: Any, metrics: dict[str, float], **__: Any) -> None:
            seen.append(metrics)

    metrics = {"loss": 7.0, "eval_loss": 8.0, "val_loss": 9.0, 0: 0.5}
    result = trained_on_points(Noisy(), compute_metrics=lambda _: metrics, callbacks=[Seer()])
    assert seen[-1]["eval_loss"] == result.final_loss
    assert seen[-1]["eval_metric_loss"] == 7.0
    frame = result.to_frame("evaluations")
    assert (frame["val_loss"].item(), frame["metric_val_loss"].item()) == (result.final_loss, 9.0)
    assert result.metrics[-1]["0"] == 0.5  # a whole number as a name
