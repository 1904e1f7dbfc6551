"""The search: fair trials pruned at equal rows, failures that end only one trial, and studies that resume."""

import csv
import gc
import inspect
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, MedianPruner, PercentilePruner, ThresholdPruner
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState
from torch import nn
from transformers import TrainerCallback

import ftaccum.apps.search.runner
import ftaccum.apps.search.study
import ftaccum.apps.search.worker
import ftaccum.runtime.signals
from ftaccum import DataError, DivergedError, SettingsError, test_fine_tuning
from ftaccum.apps.search.reports import plot_history
from ftaccum.apps.search.retry import is_counted, is_dead, requeue_dead, this_worker
from ftaccum.apps.search.samplers import make_pruner
from ftaccum.apps.search.study import hide_password, open_storage
from ftaccum.apps.search.tables import best_trial, format_table, parameter_importances, summarize, trial_rows
from ftaccum.apps.search.trial import train_new_model
from ftaccum.training.callbacks import Callback
from searching import N_ROWS, Layer, points, quick
from training_passes import is_training_pass

TRAINED = N_ROWS - 8
BUDGET = 2 * TRAINED
FINISHED, PRUNED, FAILED = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


def ended(study: optuna.Study) -> list[FrozenTrial]:
    return [trial for trial in study.trials if is_counted(trial)]


def proposals(study: optuna.Study) -> list[dict[str, Any]]:
    return [trial.params for trial in ended(study)]


class Kept:
    """A model factory that records the initial weights and the rows of each trial."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.models: list[weakref.ref[nn.Module]] = []
        self.points: list[list[float]] = []

    def model(self) -> nn.Module:
        assert not [ref for ref in self.models if ref() is not None], "a trial before was not released"
        model = Layer()
        model.register_forward_pre_hook(self._see)
        self.weights.append({name: weight.clone() for name, weight in model.state_dict().items()})
        self.models.append(weakref.ref(model))
        self.points.append([])
        return model

    def _see(self, model: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if model.training and is_training_pass():
            self.points[-1] += inputs[0][:, 0].tolist()


# --- contents of a study


@pytest.mark.slow
def test_trials_use_the_names_of_arguments_and_record_their_settings(tmp_path: Path) -> None:
    study = quick(n_trials=12, output_dir=str(tmp_path))
    assert len(study.trials) == len(ended(study)) == 12
    assert {trial.state for trial in study.trials} == {FINISHED, PRUNED}
    assert study.trials[0].params["gradient_accumulation_steps"] == 1  # the first trial does not accumulate
    for trial in study.trials:
        assert trial.distributions == {
            "gradient_accumulation_steps": CategoricalDistribution([1, 2, 4, 8]),
            "learning_rate": FloatDistribution(1e-4, 1e-1, log=True),
        }
        assert trial.user_attrs["effective_batch_size"] == 2 * trial.params["gradient_accumulation_steps"]
        assert trial.user_attrs["learning_rate"] == trial.params["learning_rate"]
        folder = Path(trial.user_attrs["output_dir"])
        assert folder.parent.parent == tmp_path
        assert (folder / "ledger.jsonl").stat().st_size
        assert not (folder / "model").exists()
        assert (trial.user_attrs["rows"] == BUDGET) == (trial.state == FINISHED)


@pytest.mark.slow
def test_a_trials_value_is_the_final_loss_of_the_same_run_outside_a_search() -> None:
    kept = Kept()
    study = quick(model_factory=kept.model, n_trials=3, pruner="none")
    for trial, weights in zip(study.trials, kept.weights, strict=True):
        model = Layer()
        model.load_state_dict(weights)
        result = test_fine_tuning(
            model, train_data=points(), loss_fn=nn.CrossEntropyLoss(), validation_split=1 / 9, n_epochs=2, batch_size=2,
            progress=False, **trial.params,
        )  # fmt: skip
        assert result.final_loss == pytest.approx(trial.value, rel=1e-6)


def test_the_result_of_a_trial_does_not_keep_its_model_in_memory() -> None:
    kept = Kept()
    defaults = {name: parameter.default for name, parameter in inspect.signature(test_fine_tuning).parameters.items()}
    given = {"train_data": points(), "loss_fn": nn.CrossEntropyLoss(), "max_updates": 1, "progress": False}
    result = train_new_model(kept.model, defaults | given, Callback())
    assert result.model is None
    assert kept.models[0]() is None


@pytest.mark.slow
def test_equal_seeds_propose_equal_trials_and_another_seed_does_not() -> None:
    assert proposals(quick()) == proposals(quick())
    assert proposals(quick()) != proposals(quick(seed=7))


# --- fair


@pytest.mark.slow
def test_trials_that_carry_remainders_meet_where_their_updates_end() -> None:
    """No updates of 3, 6 or 12 rows end with the epoch of 64 rows, but all end after 72 and 84 rows."""
    never = ThresholdPruner(upper=1e-9, n_warmup_steps=65)
    study = quick(pruner=never, n_reports=8, batch_size=3, accumulation_steps=(1, 2, 4), remainder="carry", n_trials=6)
    assert len({trial.params["gradient_accumulation_steps"] for trial in study.trials}) > 1
    for trial in study.trials:
        assert trial.state == PRUNED
        assert trial.user_attrs["rows"] == 84


@pytest.mark.slow
def test_every_trial_sees_the_same_rows_in_the_same_order_from_the_same_weights() -> None:
    kept = Kept()
    torch.manual_seed(0)  # does not affect the initial weights of trials
    study = quick(model_factory=kept.model, n_trials=6, pruner="none", planner=False, audit=False)
    assert len({trial.params["gradient_accumulation_steps"] for trial in study.trials}) > 2
    torch.manual_seed(1)
    quick(model_factory=kept.model, n_trials=1)  # for example by another worker
    assert all(torch.equal(weights["layer.weight"], kept.weights[0]["layer.weight"]) for weights in kept.weights)
    assert all(len(seen) == BUDGET for seen in kept.points[:6])
    assert all(seen == kept.points[0] for seen in kept.points[:6])


@pytest.mark.slow
def test_trials_report_at_the_same_rows_whatever_their_batch(tmp_path: Path) -> None:
    study = quick(n_trials=6, pruner="none", n_reports=4, output_dir=str(tmp_path))
    assert len({trial.params["gradient_accumulation_steps"] for trial in study.trials}) > 2
    for trial in study.trials:
        assert list(trial.intermediate_values) == [BUDGET // 4 * n for n in (1, 2, 3, 4)]
        assert trial.value == trial.intermediate_values[BUDGET]


def test_a_pruned_trial_ends_at_a_milestone_and_records_why() -> None:
    never = ThresholdPruner(upper=1e-9, n_warmup_steps=40)  # prunes everything once it has passed 40 rows
    study = quick(pruner=never, n_reports=4)
    for trial in study.trials:
        assert trial.state == PRUNED
        assert trial.user_attrs["rows"] == 64
        assert re.fullmatch(r"pruned at 64 of 128 rows", trial.user_attrs["reason"])
        assert list(trial.intermediate_values) == [32, 64]


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["successive_halving", "hyperband", "median", PercentilePruner(25, 2)])
def test_bad_trials_are_pruned(pruner: str | BasePruner) -> None:
    def rates(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        # Good trials come first, then trials that learn nothing.
        return {"warmup_steps": 0 if trial.number < 6 else 10_000}

    study = quick(n_trials=12, learning_rate=0.05, pruner=pruner, space=rates)
    states = [trial.state for trial in study.trials]
    assert FINISHED in states[:6]
    assert states[6:].count(PRUNED) >= 4
    rows = sum(trial.user_attrs["rows"] for trial in study.trials)
    assert rows < 12 * BUDGET


@pytest.mark.slow
def test_nothing_is_pruned_without_a_pruner() -> None:
    assert {trial.state for trial in quick(pruner="none", n_trials=8).trials} == {FINISHED}


# --- the space


def test_one_accumulation_step_is_always_a_candidate() -> None:
    study = quick(accumulation_steps=(4, 2), n_trials=1)
    assert study.trials[0].distributions["gradient_accumulation_steps"] == CategoricalDistribution([1, 2, 4])


@pytest.mark.slow
def test_k_can_be_an_integer_and_other_arguments_dimensions() -> None:
    study = quick(
        accumulation_steps=IntDistribution(1, 6),
        space={
            "weight_decay": FloatDistribution(1e-3, 0.1, log=True),
            "lr_scheduler": CategoricalDistribution(["linear", "cosine"]),
            "warmup_steps": IntDistribution(0, 3),
        },
        n_trials=5,
    )
    for trial in study.trials:
        assert set(trial.params) == {
            "gradient_accumulation_steps", "learning_rate", "weight_decay", "lr_scheduler", "warmup_steps",
        }  # fmt: skip
        assert isinstance(trial.params["gradient_accumulation_steps"], int)


def test_a_function_of_the_trial_can_give_any_argument() -> None:
    def optimizer(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        momentum = trial.suggest_float("momentum", 0.1, 0.9)
        return {"optimizer": lambda groups: torch.optim.SGD(groups, momentum=momentum)}

    study = quick(space=optimizer)
    assert all("momentum" in trial.params for trial in study.trials)
    assert len(ended(study)) == 4


@pytest.mark.slow
@pytest.mark.parametrize(("coupling", "power"), [("none", 0), ("sqrt", 0.5), ("linear", 1)])
def test_a_coupled_rate_is_scaled_with_the_effective_batch(tmp_path: Path, coupling: str, power: float) -> None:
    study = quick(couple_learning_rate=coupling, reference_batch_size=8, output_dir=str(tmp_path), pruner="none")
    assert len({trial.user_attrs["effective_batch_size"] for trial in study.trials}) > 1
    for trial in study.trials:
        factor = (trial.user_attrs["effective_batch_size"] / 8) ** power
        used = trial.params["learning_rate"] * factor
        assert trial.user_attrs["learning_rate"] == pytest.approx(used)
        lines = (Path(trial.user_attrs["output_dir"]) / "ledger.jsonl").read_text().splitlines()
        first = next(line for line in lines if line.startswith('{"window": 0'))
        assert f'"learning_rate": {trial.user_attrs["learning_rate"]}' in first


@pytest.mark.slow
def test_a_coupled_beta2_keeps_its_half_life_in_rows() -> None:
    made: list[torch.optim.Optimizer] = []

    def adam(groups: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.Adam(groups, betas=(0.8, 0.99)))
        return made[-1]

    study = quick(couple_beta2=True, optimizer=adam, pruner="none")
    assert len({trial.user_attrs["effective_batch_size"] for trial in study.trials}) > 1
    for trial, optimizer in zip(study.trials, made, strict=True):
        k = trial.params["gradient_accumulation_steps"]
        beta1, beta2 = optimizer.param_groups[0]["betas"]
        assert beta1 == 0.8
        assert beta2 == trial.user_attrs["beta2"] == pytest.approx(0.99**k)
        # B · ln(1/2) / ln β2 is the same number of rows in all trials.
        assert 2 * k * math.log(0.5) / math.log(beta2) == pytest.approx(2 * math.log(0.5) / math.log(0.99))


def test_an_optuna_sampler_can_be_given() -> None:
    study = quick(sampler=RandomSampler(seed=1), n_trials=2)
    assert len(ended(study)) == 2


# --- failures


@pytest.mark.slow
def test_a_failure_ends_only_its_trial_with_a_reason_and_frees_the_model(tmp_path: Path) -> None:
    kept, n_calls = Kept(), 0

    def factory() -> nn.Module:
        nonlocal n_calls
        n_calls += 1
        model = kept.model()
        if n_calls == 2:
            raise ValueError("no such checkpoint")
        if n_calls == 3:
            model.register_forward_hook(_run_out)
        if n_calls == 4:
            model.register_forward_hook(_diverged_once_trained)
        return model

    study = quick(model_factory=factory, n_trials=6, output_dir=str(tmp_path))
    states = [trial.state for trial in study.trials]
    assert states[:4] == [FINISHED, FAILED, FAILED, PRUNED]
    reasons = [trial.user_attrs.get("reason", "") for trial in study.trials]
    assert re.fullmatch(r"ValueError: no such checkpoint \(test_search\.py, line \d+\)", reasons[1])
    assert "no such checkpoint" in (tmp_path / "trials" / "0001" / "error.txt").read_text()
    assert reasons[2].startswith("ran out of memory: ")
    assert reasons[3] == "diverged at 16 of 128 rows, with a validation loss of nan"
    assert len(study.trials) == 6


def _run_out(*_: Any) -> None:
    if is_training_pass():
        raise torch.OutOfMemoryError("CUDA out of memory.")


def _diverged_once_trained(model: nn.Module, _: Any, outputs: torch.Tensor) -> torch.Tensor | None:
    if is_training_pass():
        model.trained = True
    return outputs * math.nan if hasattr(model, "trained") and not model.training else None


def test_a_trial_whose_updates_are_not_finite_has_diverged() -> None:
    def factory() -> nn.Module:
        model = Layer()
        model.register_forward_hook(lambda m, _, outputs: outputs * math.nan if _in_training(m) else None)
        return model

    study = quick(model_factory=factory, n_trials=1, nonfinite_patience=2)
    assert study.trials[0].state == PRUNED
    assert study.trials[0].user_attrs["reason"].startswith("diverged at update 2: Update 2 is skipped: its loss is nan")


def _in_training(model: nn.Module) -> bool:
    model.trained = getattr(model, "trained", False) or is_training_pass()
    return model.trained


@pytest.mark.slow
def test_a_trial_with_a_nonfinite_final_loss_has_no_value() -> None:
    def factory() -> nn.Module:
        model = Layer()
        model.register_forward_hook(_diverged_once_trained)
        return model

    study = quick(model_factory=factory, trade_time=True, n_trials=2)
    assert [trial.state for trial in study.trials] == [FAILED] * 2
    assert all(trial.user_attrs["reason"].startswith("diverged") for trial in study.trials)


@pytest.mark.slow
def test_a_factory_that_returns_a_trained_model_is_refused() -> None:
    model = Layer()
    with pytest.raises(SettingsError, match="returned a model that an earlier trial has trained"):
        quick(model_factory=lambda: model)


def test_a_function_of_the_trial_that_returns_an_unknown_name_ends_the_search() -> None:
    with pytest.raises(SettingsError, match="'weight_decya', which is not an argument"):
        quick(space=lambda _: {"weight_decya": 0.1})


@pytest.mark.slow
def test_bad_data_end_the_search_without_using_up_a_trial(tmp_path: Path) -> None:
    folder = str(tmp_path)
    kept, bad = Kept(), points()
    bad[3] = (bad[3][0], torch.tensor(5))
    gc.disable()
    try:
        with pytest.raises(DataError, match="row 3 has the label 5") as caught:
            quick(model_factory=kept.model, train_data=bad, output_dir=folder)
        assert caught.value.__traceback__ is not None
        assert kept.models[0]() is None  # although the error is still referenced
    finally:
        gc.enable()
    study = quick(output_dir=folder)
    assert len(ended(study)) == 4
    assert proposals(study)[0]["gradient_accumulation_steps"] == 1  # the queued first trial was not lost


@pytest.mark.slow
def test_a_hand_written_loop_needs_no_cleanup_between_trials() -> None:
    def objective(trial: optuna.Trial) -> float:
        result = test_fine_tuning(
            Layer(),
            train_data=points(),
            loss_fn=nn.CrossEntropyLoss(),
            gradient_accumulation_steps=trial.suggest_categorical("gradient_accumulation_steps", [1, 2, 4, 8]),
            learning_rate=trial.suggest_float("learning_rate", 1e-5, 1e-3, log=True),
            mixed_precision=trial.suggest_categorical("mixed_precision", ["no", "bf16"]),
            progress=False,
            n_epochs=1,
        )
        return result["final_loss"]

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    study.optimize(objective, n_trials=6)
    assert len({trial.params["mixed_precision"] for trial in study.trials}) == 2
    assert all(trial.state == FINISHED for trial in study.trials)


def test_a_quiet_hand_written_loop_survives_trials_that_diverge(capsys: pytest.CaptureFixture[str]) -> None:
    def objective(trial: optuna.Trial) -> float:
        rate = trial.suggest_float("learning_rate", 1e-3, 1e38, log=True)
        return test_fine_tuning(
            Layer(), train_data=points(16), loss_fn=nn.CrossEntropyLoss(), learning_rate=rate, n_epochs=1,
            nonfinite_patience=2, lr_scheduler="constant", gradient_clip_norm=None, audit=False, verbosity="quiet",
        ).final_loss  # fmt: skip

    study = optuna.create_study()
    for rate in (1e-3, 1e38, 1e-2):
        study.enqueue_trial({"learning_rate": rate})
    study.optimize(objective, n_trials=3, catch=(DivergedError,))
    assert [trial.state for trial in study.trials] == [FINISHED, FAILED, FINISHED]
    assert capsys.readouterr().out == ""


# --- resuming


def interrupted(after: int) -> Callable[[], nn.Module]:
    """Return a factory that is interrupted in the trial after this many."""
    made = 0

    def factory() -> nn.Module:
        nonlocal made
        made += 1
        if made > after:
            raise KeyboardInterrupt
        return Layer()

    return factory


@pytest.mark.slow
def test_an_interrupted_search_resumes_as_if_undisturbed(tmp_path: Path) -> None:
    whole = quick(n_trials=8)
    for after in (0, 3, 2):
        with pytest.raises(KeyboardInterrupt):
            quick(n_trials=8, output_dir=str(tmp_path), model_factory=interrupted(after))
    study = quick(n_trials=8, output_dir=str(tmp_path))
    assert len(ended(study)) == 8
    assert len([t for t in study.trials if t.state == FAILED]) == 3
    assert proposals(study) == proposals(whole)
    assert len(ended(quick(n_trials=8, output_dir=str(tmp_path)))) == 8  # nothing remains to do
    assert len(ended(quick(n_trials=10, output_dir=str(tmp_path)))) == 10


@pytest.mark.slow
def test_an_interrupt_takes_effect_after_the_next_update(tmp_path: Path) -> None:
    def factory() -> nn.Module:
        signal.raise_signal(signal.SIGTERM)  # as if during an access to the storage
        return Layer()

    def n_updates() -> int:
        return (tmp_path / "trials" / "0000" / "ledger.jsonl").read_text().count('"window"')

    for n in (1, 2):  # resumes the trial instead of restarting it
        with pytest.raises(KeyboardInterrupt):
            quick(model_factory=factory, output_dir=str(tmp_path), deterministic=True)
        assert n_updates() == n
    study, undisturbed = quick(output_dir=str(tmp_path), n_trials=1), quick(n_trials=1)
    assert [trial.state for trial in study.trials] == [FAILED, FAILED, FINISHED]
    assert study.best_value == undisturbed.best_value
    reported = [trial.intermediate_values for trial in (study.best_trial, undisturbed.best_trial)]
    assert reported[0] == reported[1]
    assert summarize(study).endswith(f"rows trained on       {BUDGET}")
    states = [row["state"] for row in trial_rows(study)]
    assert states == ["interrupted, resumed as trial 2"] * 2 + ["finished"]
    assert not list((tmp_path / "trials" / "0000").glob("checkpoints*"))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_a_second_interrupt_takes_effect_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ftaccum.runtime.signals, "_TWICE", 0.05)

    def factory() -> nn.Module:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the same interrupt, forwarded by a launcher
        time.sleep(0.1)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("unreachable")

    with pytest.raises(KeyboardInterrupt):
        quick(model_factory=factory, output_dir=str(tmp_path))
    assert [trial.state for trial in quick(output_dir=str(tmp_path), n_trials=1).trials] == [FAILED, FINISHED]


@pytest.mark.slow
@pytest.mark.processes
def test_a_killed_search_resumes_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from searching import Layer, quick\n"
        "def factory():\n"
        "    print('trial', file=sys.stderr, flush=True); time.sleep(0.5); return Layer()\n"
        f"quick(model_factory=factory, n_trials=5, output_dir={str(tmp_path)!r})\n"
    )
    command = [sys.executable, "-c", code]
    here_lie_its_modules = Path(__file__).parent
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=here_lie_its_modules) as worker:
        assert worker.stderr is not None
        trials = (line for line in worker.stderr if line == "trial\n")
        next(trials), next(trials)
        worker.send_signal(signal.SIGKILL)
    study = quick(n_trials=5, output_dir=str(tmp_path))
    assert len(ended(study)) == 5
    (lost,) = (trial for trial in study.trials if trial.state == FAILED)
    (again,) = (trial for trial in study.trials if "first_run" in trial.user_attrs)
    assert lost.number == 1
    assert again.params == lost.params


@pytest.mark.slow
def test_a_trial_whose_workers_die_is_given_up_and_counts(tmp_path: Path) -> None:
    folder = str(tmp_path)
    study = quick(n_trials=1, output_dir=folder)
    for _ in range(4):
        dead = asked(study)
        dead.suggest_float("learning_rate", 1e-4, 1e-1, log=True)
        dead.set_user_attr("worker", this_worker() | {"started": 0.0})
        requeue_dead(study, {})
    assert [trial.user_attrs.get("deaths") for trial in study.trials] == [None, None, 1, 2, 3]
    assert len({trial.params["learning_rate"] for trial in study.trials[1:]}) == 1
    assert len(ended(study)) == 2
    assert format_table(trial_rows(study)).count("the workers that ran it died") == 1
    assert len(quick(n_trials=3, output_dir=folder).trials) == 6


@pytest.mark.slow
def test_interrupting_a_trial_often_does_not_give_it_up(tmp_path: Path) -> None:
    for _ in range(6):
        with pytest.raises(KeyboardInterrupt):
            quick(n_trials=1, output_dir=str(tmp_path), model_factory=interrupted(0))
    study = quick(n_trials=1, output_dir=str(tmp_path))
    assert [trial.state for trial in study.trials] == [FAILED] * 6 + [FINISHED]
    assert len({tuple(trial.params.items()) for trial in study.trials}) == 1


@pytest.mark.slow
def test_trials_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    folder = str(tmp_path)
    quick(output_dir=folder, n_trials=2)
    with pytest.raises(SettingsError) as caught:
        quick(output_dir=folder, batch_size=4, n_epochs=3)
    assert len(caught.value.faults) == 2
    assert "was created with `n_epochs` 2, and this search has 3" in str(caught.value)
    with pytest.raises(DataError, match="have 128 rows each, but with this `train_data` a trial has 66"):
        quick(output_dir=folder, train_data=points(37), n_trials=3)
    assert len(ended(quick(output_dir=folder, n_trials=3))) == 3


@pytest.mark.slow
def test_an_interrupt_at_the_very_end_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ftaccum.apps.search.runner, "write_reports", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        quick(output_dir=str(tmp_path), refit=True, n_trials=1)
    assert not (tmp_path / "best").exists()


@pytest.mark.slow
def test_dimensions_that_optuna_cannot_merge_are_refused(tmp_path: Path) -> None:
    folder, schedules = str(tmp_path), CategoricalDistribution(["linear"])
    quick(output_dir=folder, n_trials=1, space={"lr_scheduler": schedules})
    with pytest.raises(SettingsError, match=r"has trials with `lr_scheduler` from .* Only the ends of a range"):
        quick(output_dir=folder, n_trials=2, space={"lr_scheduler": CategoricalDistribution(["linear", "cosine"])})
    wider = quick(output_dir=folder, n_trials=2, space={"lr_scheduler": schedules}, learning_rate=(1e-5, 1e-1))
    assert len(ended(wider)) == 2


@pytest.mark.slow
def test_two_workers_on_one_machine_do_not_take_the_same_queued_trial(tmp_path: Path) -> None:
    study = quick(output_dir=str(tmp_path), n_trials=1)
    for _ in range(30):
        study.enqueue_trial({"gradient_accumulation_steps": 1})
    together = threading.Barrier(2)

    def taken() -> list[int]:
        mine = optuna.load_study(study_name=study.study_name, storage=open_storage(None, tmp_path))
        together.wait()
        return [asked(mine).number for _ in range(15)]

    with ThreadPoolExecutor(2) as workers:
        found = [future.result() for future in [workers.submit(taken) for _ in range(2)]]
    assert sorted(found[0] + found[1]) == list(range(1, 31))


def asked(study: optuna.Study) -> optuna.Trial:
    """Return the trial of a worker that dies at once, before its first heartbeat."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna warns of this
        return study.ask()


@pytest.mark.slow
def test_two_workers_that_see_one_trial_left_run_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path)
    study = quick(output_dir=folder, n_trials=3)
    monkeypatch.setattr(ftaccum.apps.search.worker.Worker, "_next", _go_once(ftaccum.apps.search.worker.Worker._next))
    assert len(ended(quick(output_dir=folder, n_trials=3))) == 3
    study = optuna.load_study(study_name=study.study_name, storage=f"sqlite:///{tmp_path}/study.db")
    assert [trial.state for trial in study.trials[3:]] == [FAILED]


def _go_once(look: Callable[[Any], str]) -> Callable[[Any], str]:
    """Wrap `Worker._next`: its first call sees old trials, before another worker took the last one."""
    looks = iter(["run"])
    return lambda worker: next(looks, None) or look(worker)


@pytest.mark.slow
def test_a_worker_presumed_dead_leaves_its_trial_to_the_others(tmp_path: Path) -> None:
    given_up = 0

    def factory() -> nn.Module:
        nonlocal given_up
        if not given_up:
            given_up += 1
            other = optuna.load_study(study_name=tmp_path.name, storage=f"sqlite:///{tmp_path}/study.db")
            other.tell(0, state=FAILED)
        return Layer()

    theirs, others = [tmp_path / "trials" / f"{n:04d}" / "checkpoints" / "update-00000001" for n in (0, 1)]
    theirs.mkdir(parents=True)  # the worker that took over the trial writes to the same folder
    study = quick(model_factory=factory, output_dir=str(tmp_path), n_trials=2)
    assert study.trials[0].state == FAILED
    assert len(ended(study)) == 2
    assert theirs.parent.exists() or theirs.parent.with_name("checkpoints.previous").exists()
    assert not others.parent.exists()


@pytest.mark.slow
def test_a_trial_that_will_run_again_keeps_its_checkpoints(tmp_path: Path) -> None:
    made = 0

    def factory() -> nn.Module:
        nonlocal made
        made += 1
        (tmp_path / "trials" / f"{made - 1:04d}" / "checkpoints" / "update-00000001").mkdir(parents=True)
        if made == 2:
            raise DataError("the disk is gone")
        return Layer()

    with pytest.raises(DataError, match="the disk is gone"):
        quick(model_factory=factory, output_dir=str(tmp_path), n_trials=2)
    assert [(tmp_path / "trials" / n / "checkpoints").exists() for n in ("0000", "0001")] == [False, True]


# --- workers and storages


@pytest.mark.processes
@pytest.mark.slow
def test_workers_share_a_study_of_n_trials_in_all(tmp_path: Path) -> None:
    rate = 0.5

    def factory() -> nn.Module:  # local to this test, so it is pickled by value
        model = Layer()
        model.layer.bias.data.fill_(rate)
        time.sleep(0.3)
        return model

    study = quick(model_factory=factory, n_trials=7, n_workers=2, output_dir=str(tmp_path))
    assert len(ended(study)) == len(study.trials) == 7
    assert len({trial.user_attrs["worker"]["process"] for trial in study.trials}) == 2
    assert (tmp_path / "report.html").exists()


@pytest.mark.processes
@pytest.mark.slow
def test_the_search_raises_the_error_of_a_worker(tmp_path: Path) -> None:
    bad = points()
    bad[3] = (bad[3][0], torch.tensor(5))
    with pytest.raises(DataError, match="row 3 has the label 5"):
        quick(train_data=bad, n_workers=2, output_dir=str(tmp_path))


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_of_a_trial_are_pruned_together(tmp_path: Path, two_processes: Callable[..., str]) -> None:
    printed = two_processes("search_of_two.py", str(tmp_path))
    seen = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert sorted(process["process"] for process in seen) == [0, 1]
    for process in seen:
        trials = process["trials"]
        assert [state for state, _, _ in trials] == ["COMPLETE", "PRUNED", "FAIL", "PRUNED", "FAIL", "PRUNED"]
        assert [rows for _, _, rows in trials] == [128, 96, 0, 96, None, 96]
        assert trials[0][1] == 4  # k = 1 on both
        assert process["made"] == 6  # five trials and the refit; the reassigned trial needs no model
    assert seen[0]["value"] == seen[1]["value"]


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("failing", ["0", "1"])
def test_a_process_that_fails_ends_its_peers_soon(
    tmp_path: Path, two_processes: Callable[..., str], failing: str
) -> None:
    started = time.monotonic()
    with pytest.raises(AssertionError) as caught:
        two_processes("search_of_two.py", str(tmp_path), failing)
    assert time.monotonic() - started < 60
    assert "This process ended a trial" in str(caught.value)
    assert "of this process alone" in str(caught.value)
    # Nothing is lost: the trial is queued again, now or when its worker is found to be dead.
    trials = optuna.load_study(study_name=tmp_path.name, storage=f"sqlite:///{tmp_path}/study.db").trials
    states = [trial.state for trial in trials]
    assert states in ([FINISHED, FAILED, TrialState.WAITING], [FINISHED, TrialState.RUNNING])
    assert trials[-1].params == trials[1].params


def test_an_external_storage_needs_no_existing_folder(tmp_path: Path) -> None:
    def broken() -> nn.Module:
        raise RuntimeError("no weights")

    study = quick(
        model_factory=broken,
        storage=f"sqlite:///{tmp_path}/s.db",
        study_name="s",
        output_dir=str(tmp_path / "new" / "er"),
    )
    assert [trial.state for trial in study.trials] == [FAILED] * 4
    assert (tmp_path / "new" / "er" / "report.html").exists()


def test_a_storage_is_shown_without_its_password() -> None:
    assert hide_password("postgresql://me:hush@host/x?password=hush") == "postgresql://me:***@host/x"
    assert hide_password("sqlite:///study.db") == "sqlite:///study.db"


def test_a_process_is_distinguished_from_another_with_the_same_id() -> None:
    assert is_dead(this_worker()) is False
    assert is_dead(this_worker() | {"started": 0.0})
    assert is_dead(this_worker() | {"process": 2**22 + 1})
    assert is_dead(this_worker() | {"machine": "another"}) is None
    assert is_dead(None) is None


@pytest.mark.parametrize(
    ("budget", "n_reports", "first"), [(1024, 8, 256), (1025, 8, 256), (900, 7, 256), (128, 1, 128)]
)
def test_pruning_begins_at_a_quarter(budget: int, n_reports: int, first: int) -> None:
    steps = [number * (budget // n_reports) for number in range(1, n_reports)] + [budget]
    assert make_pruner("successive_halving", steps)._min_resource == first  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_journal_file_can_store_a_study(tmp_path: Path) -> None:
    storage = str(tmp_path / "study.journal")
    quick(storage=storage, study_name="mine", n_trials=2)
    study = quick(storage=storage, study_name="mine", n_trials=3)
    assert len(study.trials) == 3
    assert study.study_name == "mine"


# --- results


@pytest.mark.slow
def test_time_can_be_a_second_objective() -> None:
    study = quick(trade_time=True, n_trials=5)
    assert len(study.directions) == 2
    assert all(trial.state == FINISHED and trial.values[1] > 0 for trial in study.trials)
    assert min(trial.values[0] for trial in study.trials) in [trial.values[0] for trial in study.best_trials]


@pytest.mark.slow
def test_the_best_trial_is_run_again_and_its_model_is_saved(tmp_path: Path) -> None:
    from ftaccum import Result

    study = quick(output_dir=str(tmp_path), refit=True, n_trials=5)
    assert Result.load(tmp_path / "best").final_loss == pytest.approx(study.best_value, rel=1e-6)
    assert (tmp_path / "best" / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_finished_refit_is_reused_until_another_trial_is_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def factory() -> nn.Module:
        made.append(1)
        return Layer()

    def search(n_trials: int) -> tuple[int, int]:
        """Return the number of the best trial and the number of models made."""
        made.clear()
        study = quick(model_factory=factory, output_dir=str(tmp_path), refit=True, n_trials=n_trials)
        return study.best_trial.number, len(made)

    made: list[int] = []
    best = search(3)[0]
    weights = (tmp_path / "best" / "model" / "model.safetensors").stat()
    capsys.readouterr()
    assert search(3) == (best, 0)
    assert f"The best trial, {best}, was already run again. Its model is in" in capsys.readouterr().out
    assert (tmp_path / "best" / "model" / "model.safetensors").stat() == weights

    study = optuna.load_study(study_name=tmp_path.name, storage=open_storage(None, tmp_path))
    study.add_trial(
        optuna.trial.create_trial(params={**study.best_params}, distributions=study.best_trial.distributions, value=0.0)
    )
    assert search(3) == (3, 1)
    assert search(3) == (3, 0)
    shutil.rmtree(tmp_path / "best" / "model")
    assert search(3) == (3, 1)


@pytest.mark.parametrize("name", ["a?b", "a#b", "a%2Fb", "a{b}", "a b&c=d", "ü@b:c"])
def test_the_study_is_stored_in_its_folder_whatever_its_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    optuna.create_study(storage=open_storage(None, tmp_path / name), study_name="search")
    assert [path.name for path in tmp_path.rglob("*")] == [name, "study.db"]


def test_a_question_mark_in_the_path_of_a_url_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=r"would open 'why': .* here '/study.db'\. Write .* as %3F"):
        open_storage("sqlite:///why?/study.db", None)
    assert list(tmp_path.iterdir()) == []
    open_storage("sqlite:///study.db?timeout=5", None)
    open_storage("sqlite:///why%3F.db", None)
    assert {path.name for path in tmp_path.iterdir()} == {"study.db", "why?.db"}


@pytest.mark.slow
def test_reports_are_complete_and_self_contained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = quick(output_dir=str(tmp_path), n_trials=10, pruner="none", progress=True)
    for name in ("history", "curves", "contour", "importance"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure") == page.count("<svg ") == 4
    assert page.count("<tr>") == 11
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)  # the page needs no other files
    with (tmp_path / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == [str(n) for n in range(10)]
    assert {row["effective batch"] for row in rows} <= {"2", "4", "8", "16"}
    shown = capsys.readouterr().out
    assert "Gradient accumulation steps (effective batch size): 1 (2), 2 (4), 4 (8), 8 (16)" in shown
    assert (
        f"best loss             {study.best_value:.4f} (trial {study.best_trial.number}, of those that finished)"
        in shown
    )
    assert "effective batch size" in shown
    assert shown.count("  effective batch ") == 11  # one line per trial, and the table's heading


def test_rows_of_a_resumed_run_are_counted_once_and_metrics_have_columns() -> None:
    study = optuna.create_study()
    one = {"gradient_accumulation_steps": CategoricalDistribution([1, 2])}
    for state, attributes in (
        (FAILED, {"rows": 40, "output_dir": "trials/0000", "interrupted": True}),
        (FAILED, {"rows": 30, "interrupted": True}),  # without a folder, it was run again from its beginning
        (FINISHED, {"rows": 128, "output_dir": "trials/0000", "first_run": 0, "metrics": {"f1": 0.5, "rows": 7.0}}),
        (FINISHED, {"rows": 128, "first_run": 1, "metrics": {"recall": 0.25}}),
        (PRUNED, {"rows": 64, "output_dir": "trials/0004", "reason": "pruned at 64 of 128 rows"}),
    ):
        study.add_trial(
            optuna.create_trial(
                state=state, value=1.0 if state == FINISHED else None, user_attrs=attributes,
                params={"gradient_accumulation_steps": 1}, distributions=one,
            )
        )  # fmt: skip
    rows = trial_rows(study)
    assert list(rows[0])[4:] == ["loss", "f1", "metric rows", "recall", "rows", "seconds", "state"]
    assert [row["rows"] for row in rows] == [None, 30, 128, 128, 64]
    assert [row["state"] for row in rows[:2]] == ["interrupted, resumed as trial 2", "interrupted"]
    assert [(row["f1"], row["metric rows"], row["recall"]) for row in rows[2:]] == [
        (0.5, 7.0, None), (None, None, 0.25), (None, None, None),
    ]  # fmt: skip
    assert summarize(study).endswith("rows trained on       350")


def test_a_search_without_a_finished_trial_reports_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> nn.Module:
        raise RuntimeError("<no weights>")

    study = quick(model_factory=broken, n_trials=2, output_dir=str(tmp_path), refit=True, progress=True)
    assert [trial.state for trial in study.trials] == [FAILED] * 2
    assert "No trial finished" in capsys.readouterr().out
    assert "&lt;no weights&gt;" in (tmp_path / "report.html").read_text()


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick(n_trials=1)
    assert list(tmp_path.iterdir()) == []


# --- the metric that decides


class Scripted:
    """A `compute_metrics` that returns the given values of F1, one after the other."""

    def __init__(self, *values: float) -> None:
        self._values = iter(values)

    def __call__(self, *_: Any) -> dict[str, float]:
        return {"f1": next(self._values)}


def by_f1(*values: float, **arguments: Any) -> optuna.Study:
    """Run a search for the highest F1, with a trial per two values: before its training and at its end."""
    once = {"n_epochs": 1, "n_reports": 1, "n_trials": len(values) // 2, "accumulation_steps": (1,), "pruner": "none"}
    return quick(**{**once, "compute_metrics": Scripted(*values), "metric_for_best": "f1", **arguments})


def test_the_best_trial_has_the_greatest_metric(capsys: pytest.CaptureFixture[str]) -> None:
    study = by_f1(0.9, 0.3, 0.9, 0.7, 0.9, 0.5)
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert [trial.value for trial in study.trials] == [0.3, 0.7, 0.5]
    assert best_trial(study) == study.trials[1]
    assert "best f1               0.7 (trial 1, of those that finished)" in summarize(study)
    rows = trial_rows(study)
    assert [row["f1"] for row in rows] == [0.3, 0.7, 0.5]
    assert all(0 < row["loss"] == trial.user_attrs["val_loss"] for row, trial in zip(rows, study.trials, strict=True))
    assert "Best trial: highest f1" in capsys.readouterr().out


def test_the_plots_of_a_metric_follow_its_direction() -> None:
    study = optuna.create_study(direction="maximize")
    study.set_user_attr("ftaccum", {"metric_for_best": "f1"})
    for value in (0.3, 0.7, 0.5):
        study.add_trial(optuna.create_trial(value=value, user_attrs={"rows": 8}))
    figure = plot_history(study)
    assert figure is not None
    axes = figure.axes[0]
    assert list(axes.lines[0].get_ydata()) == [0.3, 0.7, 0.7]
    assert axes.get_ylabel() == "f1"


def test_importance_is_that_for_the_greatest_metrics() -> None:
    """With a greater x, values near the top depend on y alone, and values near the bottom on x alone."""
    study = {direction: optuna.create_study(direction=direction) for direction in ("minimize", "maximize")}
    dimensions: dict[str, Any] = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}
    for n in range(64):
        x, y = n % 8 / 7, n // 8 / 7
        value = 10 + y if x > 0.5 else x
        for each in study.values():
            each.add_trial(optuna.create_trial(value=value, params={"x": x, "y": y}, distributions=dimensions))
    shares = {direction: parameter_importances(each) for direction, each in study.items()}
    assert shares["minimize"]["x"] > 0.9
    assert shares["maximize"]["y"] > shares["minimize"]["y"] + 0.2


def test_trials_are_pruned_by_the_metric() -> None:
    study = by_f1(
        *(0.0, 0.5, 0.5),
        *(0.0, 0.9, 0.9),
        *(0.0, 0.1),
        n_trials=3, n_reports=2, pruner=MedianPruner(n_startup_trials=1),
    )  # fmt: skip
    assert [trial.state for trial in study.trials] == [FINISHED, FINISHED, PRUNED]
    assert study.trials[2].value == 0.1
    assert study.trials[2].user_attrs["reason"] == "pruned at 32 of 64 rows"


def test_a_trial_whose_metric_is_not_finite_has_diverged() -> None:
    study = by_f1(0.0, math.inf, 0.0, math.nan, 0.0, 0.5)
    assert [trial.state for trial in study.trials] == [PRUNED, PRUNED, FINISHED]
    assert [trial.value for trial in study.trials] == [None, None, 0.5]
    assert study.trials[0].user_attrs["reason"] == "diverged at 64 of 64 rows, with a value of inf for f1"


def test_an_infinite_loss_is_never_best_whatever_the_metric() -> None:
    def factory() -> nn.Module:
        model = Layer()
        model.register_forward_hook(_diverged_once_trained)
        return model

    study = by_f1(0.0, 0.5, model_factory=factory)
    assert study.trials[0].user_attrs["reason"] == "diverged at 64 of 64 rows, with a validation loss of nan"
    assert study.trials[0].value is None


def test_with_time_as_second_objective_the_metric_keeps_its_direction() -> None:
    study = by_f1(0.0, 0.5, trade_time=True)
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert study.trials[0].values[0] == 0.5
    assert "best trade-offs of f1 and time" in summarize(study)


def test_an_unknown_metric_ends_the_search_at_its_first_trial() -> None:
    storage = optuna.storages.InMemoryStorage()
    kept = Kept()
    with pytest.raises(SettingsError, match=r"returns no metric of this name\. Choose one of: val_loss, f1"):
        by_f1(*[0.5] * 6, metric_for_best="f1_macro", model_factory=kept.model, storage=storage, study_name="search")
    assert len(kept.weights) == 1
    assert kept.points == [[]]
    assert not ended(optuna.load_study(storage=storage, study_name="search"))


def test_a_study_of_another_metric_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ftaccum.apps.search.study, "_PAUSE", 0)
    storage = optuna.storages.InMemoryStorage()
    named: dict[str, Any] = {"storage": storage, "study_name": "f1"}
    by_f1(0.0, 0.5, **named)
    with pytest.raises(SettingsError, match="created with `metric_for_best` 'f1', and this search has 'val_loss'"):
        quick(n_epochs=1, **named)
    with pytest.raises(SettingsError, match="created with `greater_is_better` True, and this search has False"):
        by_f1(greater_is_better=False, n_trials=1, **named)
    assert len(by_f1(0.0, 0.6, n_trials=2, greater_is_better=True, **named).trials) == 2

    optuna.create_study(storage=storage, study_name="foreign", direction="maximize")
    with pytest.raises(SettingsError, match="'foreign' has the directions maximize, but this search has minimize"):
        quick(storage=storage, study_name="foreign")


# --- callbacks


class Counts(TrainerCallback):
    """Counts the updates since it was created, and adds the count to `ends` at the end of training."""

    ends: ClassVar[list[int]] = []

    def __init__(self) -> None:
        self.n = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.n += 1

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(self.n)


def test_each_trial_gets_copies_of_the_callbacks() -> None:
    counts = Counts()
    Counts.ends.clear()
    by_f1(*[0.5] * 4, callbacks=[counts], batch_size=32)
    assert Counts.ends == [2, 2]
    assert counts.n == 0


@pytest.mark.slow
def test_the_refit_runs_the_trial_with_the_best_metric_and_copies_of_the_callbacks(tmp_path: Path) -> None:
    counts = Counts()
    Counts.ends.clear()
    study = by_f1(
        *(0.0, 0.3), *(0.0, 0.7), *(0.0, 0.7),
        n_trials=2, callbacks=[counts], batch_size=32, refit=True, output_dir=str(tmp_path),
    )  # fmt: skip
    assert Counts.ends == [2, 2, 2]
    assert counts.n == 0
    assert json.loads((tmp_path / "best" / "trial.json").read_text())["params"] == study.trials[1].params


class Misbehaves(TrainerCallback):
    """Requests evaluations in the first trial, raises in the second, and stops the third after one update."""

    def __init__(self, trial: int) -> None:
        self._trial = trial

    def on_step_end(self, _: Any, __: Any, control: Any, **___: Any) -> None:
        control.should_evaluate = self._trial == 0
        control.should_training_stop = self._trial == 2
        if self._trial == 1:
            raise ValueError("enough")


def test_a_callback_can_fail_or_stop_its_trial_and_evaluate_more_often() -> None:
    study = by_f1(
        *(0.0, 0.1, 0.2, 0.3, 0.4), 0.0, *(0.0, 0.9),
        n_trials=3, n_reports=2, batch_size=16, space=lambda trial: {"callbacks": [Misbehaves(trial.number)]},
    )  # fmt: skip
    assert [trial.state for trial in study.trials] == [FINISHED, FAILED, PRUNED]
    assert study.trials[0].intermediate_values == {32: 0.2, 64: 0.4}
    reasons = [trial.user_attrs.get("reason", "") for trial in study.trials]
    assert re.fullmatch(
        r"CallbackError: The callback Misbehaves raised in `on_step_end` after update 1: ValueError: enough "
        r"\(test_search\.py, line \d+\)",
        reasons[1],
    )
    assert reasons[2] == "pruned by a callback, at 16 of 64 rows"
    assert best_trial(study) == study.trials[0]


class Locked(TrainerCallback):
    """Holds a lock, which cannot be copied."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


class Unpicklable(TrainerCallback):
    def __deepcopy__(self, _: Any) -> "Unpicklable":
        return self

    def __reduce__(self) -> Any:
        raise ValueError("bound to this process")


def test_callbacks_that_workers_cannot_get_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"pickling `callbacks` raised ValueError\('bound to this process'\)"):
        quick(callbacks=[Unpicklable()], n_workers=2, storage=str(tmp_path / "study.journal"))


# --- bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_trials": 0}, "`n_trials` must be a positive integer, but is 0 instead"),
        (
            {"pruner": "halving"},
            "`pruner` must be 'successive_halving', 'hyperband', 'median', 'none' or one of Optuna",
        ),
        ({"couple_learning_rate": "log"}, "`couple_learning_rate` must be 'none', 'sqrt', 'linear'"),
        ({"accumulation_steps": (1, 0)}, r"`accumulation_steps` must be positive integers.*but is \(1, 0\) instead"),
        ({"accumulation_steps": IntDistribution(2, 8)}, "an IntDistribution from 1 on"),
        ({"learning_rate": (1e-3, 1e-5)}, r"`learning_rate` must be \(lowest, highest\).*Give two positive rates"),
        ({"learning_rate": -0.1}, "`learning_rate` must be a positive number, but is -0.1"),
        (
            {"space": {"n_epochs": IntDistribution(1, 3)}},
            "`space` cannot vary 'n_epochs': every trial trains on the same rows",
        ),
        (
            {"space": {"weight_decy": FloatDistribution(0, 1)}},
            "'weight_decy', which is not an argument of `test_fine_tuning`. Did you mean 'weight_decay'",
        ),
        ({"space": {"weight_decay": (0, 1)}}, r"\(0, 1\) for 'weight_decay', which is not a distribution"),
        ({"space": {"weight_decay": FloatDistribution(-1, 1)}}, "`weight_decay` must be a non-negative number"),
        ({"space": {"lr_scheduler": CategoricalDistribution(["cosin"])}}, "`lr_scheduler` must be one of"),
        ({"space": 3}, "`space` must be a dict of Optuna distributions"),
        ({"batch_size": "auto"}, "`batch_size` must be a number in a search"),
        ({"model_factory": Layer()}, "`model_factory` must be a function that returns a new model, but is Layer"),
        ({"model": Layer()}, "Give `model_factory`"),
        ({"gradient_accumulation_steps": 4}, "Give the values to try as `accumulation_steps`"),
        ({"effective_batch_size": 64}, "`effective_batch_size` follows from `accumulation_steps`"),
        ({"max_updates": 100}, "a trial with more accumulation steps would train on more rows"),
        ({"learning_rate_scaling": "sqrt"}, "Leave it out; `couple_learning_rate` scales the rate of a trial"),
        ({"space": {"remainder": CategoricalDistribution(["flush", "carry"])}}, "`space` cannot vary 'remainder'"),
        ({"weight_decya": 0.1}, "`weight_decya` is not an argument of `search`. Did you mean 'weight_decay'?"),
        ({"validation_split": 0.0}, "A search compares validation losses"),
        ({"optimizer": torch.optim.SGD(Layer().parameters(), lr=1)}, "`optimizer` is an instance"),
        (
            {"early_stopping_patience": 2},
            "`early_stopping_patience` is 2, so trials would train on different numbers of rows",
        ),
        ({"storage": "postgresql://me@here/db"}, "`storage` may hold other studies as well, but `study_name` is None"),
        ({"metric_for_best": "f1"}, "`metric_for_best` is 'f1', but `compute_metrics` is None"),
        (
            {"metric_for_best": "score", "compute_metrics": len},
            "its name does not tell whether greater values are better. Check its spelling, and set",
        ),
        (
            {"space": {"metric_for_best": CategoricalDistribution(["f1", "recall"])}},
            "`space` cannot vary 'metric_for_best': it decides which trial is the best",
        ),
        ({"callbacks": [TrainerCallback]}, "`callbacks` contains the class TrainerCallback. Give an object"),
        (
            {"callbacks": [Locked()]},
            "`callbacks` contains a Locked, but each trial needs its own copy, and copying it raised TypeError",
        ),
        ({"refit": True}, "`refit` saves a model, but `output_dir` is None"),
        ({"n_workers": 2}, "`n_workers` is 2, but the study would be in the memory of one process"),
        ({"storage": "nosuchdb://here/x", "study_name": "x"}, "`storage` 'nosuchdb://here/x' cannot be opened"),
    ],
)
def test_bad_input_is_refused_before_any_trial(given: dict[str, Any], message: str) -> None:
    def never() -> nn.Module:
        raise AssertionError("a model was made")

    with pytest.raises(SettingsError, match=re.compile(message, re.DOTALL)):
        quick(**{"model_factory": never, **given})
