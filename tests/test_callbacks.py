"""Callbacks that observe a run."""

import inspect
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from ftaccum import test_fine_tuning
from ftaccum.planning.base_plan import BasePlan
from ftaccum.planning.plan import Plan
from ftaccum.tracking.ledger import EvaluationEntry
from ftaccum.training.callbacks import Callback
from ftaccum.training.config import RunConfig
from ftaccum.training.run import run_training
from heads import HEADS

HEAD = HEADS["sequence classification, BERT"]


class Recorder(Callback):
    def __init__(self, *rows: int) -> None:
        self._rows, self.seen = rows, list[EvaluationEntry]()

    def evaluation_rows(self, plan: BasePlan) -> Iterable[int]:
        assert isinstance(plan, Plan)
        assert (plan.n_rows, plan.n_epochs) == (30, 2)
        return self._rows

    def on_evaluation(self, entry: EvaluationEntry) -> None:
        self.seen.append(entry)


def run(callback: Callback, **arguments: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Train for two epochs of 30 rows in windows of 8, with dropout, so that every random number matters."""
    torch.manual_seed(0)
    model = HEAD.model().float()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    defaults = {n: p.default for n, p in inspect.signature(test_fine_tuning).parameters.items()}
    given = {"n_epochs": 2, "batch_size": 2, "effective_batch_size": 8, "progress": False, "deterministic": True}
    data = {"train_data": HEAD.rows(36), "validation_split": 1 / 6}
    config = RunConfig.from_arguments({**defaults, **given, **data, **arguments, "model": model})
    result = run_training(config, callback)
    return model.state_dict(), result


def test_evaluations_follow_the_first_update_that_reaches_a_number_of_rows() -> None:
    callback = Recorder(5, 8, 20, 30, 41, 60)
    _, result = run(callback)
    # An epoch is updates of 8, 8, 8 and 6 rows. 5 and 8 are reached by the same update.
    assert [entry.rows for entry in callback.seen] == [8, 24, 30, 46, 60]
    assert [entry.val_loss for entry in callback.seen] == result.val_loss_history
    assert result.evaluation_updates == [1, 3, 4, 6, 8]


def test_a_callback_that_only_observes_changes_nothing() -> None:
    alone, alone_result = run(Callback())
    watched, watched_result = run(Recorder(8, 16, 30, 38))
    assert all(torch.equal(alone[name], watched[name]) for name in alone)
    assert watched_result.loss_history == alone_result.loss_history
    assert watched_result.val_loss_history[-3::2] == alone_result.val_loss_history


@pytest.mark.slow
def test_an_error_in_a_callback_ends_the_run_and_the_next_run_works() -> None:
    class Stopper(Recorder):
        def on_evaluation(self, entry: EvaluationEntry) -> None:
            raise KeyError(entry.rows)

    with pytest.raises(KeyError, match="16"):
        run(Stopper(16))
    run(Callback())


@pytest.mark.slow
def test_throughput_excludes_evaluations_within_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from ftaccum.training.evaluation import Evaluation

    def slow(*given: Any) -> Any:
        time.sleep(0.4)
        return evaluate(*given)

    evaluate = Evaluation.__call__
    monkeypatch.setattr(Evaluation, "__call__", slow)
    _, result = run(Recorder(8, 16, 24, 38, 46, 54))
    assert result.training_time > 8 * 0.4
    assert result.samples_per_second > 60 / (6 * 0.4)
