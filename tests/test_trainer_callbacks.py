"""Transformers' callbacks in our runs, and our own ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from ftaccum import CallbackError, SettingsError, test_fine_tuning
from ftaccum.callbacks import ExponentialMovingAverage, GenerateSamples, OptunaPruning
from ftaccum.runtime.log import run_logging
from ftaccum.training.callback_states import restore_states
from interrupted import CutOff, checkpoints_of, fine_tuned, ledger_of, model
from silent_errors.text_columns import REVIEWS, causal_lm, word_tokenizer
from slow_parameters import some_slow

UPDATE_EVENTS = ["on_evaluate", "on_substep_end", "on_pre_optimizer_step", "on_step_end"]
EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


class Recorder(TrainerCallback):
    """Notes each event and the number of updates at that time."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.kwargs: dict[str, dict[str, Any]] = {}
        self.args: Any = None
        self.state: Any = None

    def names(self, update: int) -> list[str]:
        return [name for name, n in self.seen if n == update]


def _note(name: str) -> Any:
    def event(self: Recorder, args: Any, state: Any, _: Any, **kwargs: Any) -> None:
        self.seen.append((name, state.global_step))
        self.kwargs[name], self.args, self.state = kwargs, args, state

    return event


for _name in EVENTS:
    setattr(Recorder, _name, _note(_name))


def test_events_come_in_the_order_of_trainer(tmp_path: Path) -> None:
    recorder = Recorder()
    fine_tuned(callbacks=[recorder], n_epochs=1, evaluate_every=4, log_every=2, output_dir=str(tmp_path))
    assert recorder.names(0) == [
        "on_init_end", "on_train_begin", "on_epoch_begin", "on_step_begin",
        *["on_substep_end"] * 3, "on_pre_optimizer_step", "on_optimizer_step",
    ]  # fmt: skip
    assert recorder.names(4)[:4] == ["on_step_end", "on_log", "on_log", "on_evaluate"]
    assert recorder.names(7)[-6:] == ["on_epoch_end", "on_log", "on_evaluate", "on_save", "on_log", "on_train_end"]


def test_callbacks_see_the_settings_and_the_objects_of_the_run() -> None:
    recorder, trained = Recorder(), model()
    settings = {"evaluate_every": 4, "restore_best_weights": True, "eval_batch_size": 5}
    result = fine_tuned(trained, callbacks=[recorder], **settings).result
    args, state, kwargs = recorder.args, recorder.state, recorder.kwargs["on_step_end"]
    assert isinstance(args, TrainingArguments)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.eval_steps) == (2, 4, 4)
    assert args.per_device_eval_batch_size == 5
    assert (args.device.type, args.world_size, args.process_index, args.n_gpu) == ("cpu", 1, 0, 0)
    assert (args.learning_rate, args.lr_scheduler_type, args.load_best_model_at_end) == (1e-3, "cosine", True)
    assert (state.global_step, state.max_steps, state.epoch, state.num_train_epochs) == (14, 14, 2.0, 2)
    assert (state.best_metric, state.best_global_step) == (result.best_val_loss, result.best_update)
    assert kwargs["model"] is trained
    assert isinstance(kwargs["optimizer"], torch.optim.Optimizer)
    assert args.to_dict()["per_device_train_batch_size"] == 2
    metrics = recorder.kwargs["on_evaluate"]["metrics"]
    assert metrics == {"eval_loss": result.val_loss_history[-1], "epoch": 2.0}
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    means = [sum(part) / len(part) for part in (result.loss_history[:10], result.loss_history[10:])]
    assert losses == pytest.approx(means, rel=0.02)  # the updates of an epoch's end have fewer rows


def test_transformers_own_callbacks_run_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    stopper = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=1e6)
    result = fine_tuned(callbacks=[PrinterCallback(), stopper], evaluate_every=1, log_every=1).result
    assert (result.evaluation_updates, stopper.early_stopping_patience_counter) == ([1, 2, 3], 2)
    out, err = capsys.readouterr()
    assert "'eval_loss':" in out
    assert "A callback stopped the run after update 3." in err


class Flagger(TrainerCallback):
    """Sets a flag of the control after some updates."""

    def __init__(self, **flags: int) -> None:
        self._flags = flags

    def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> Any:
        for name, update in self._flags.items():
            if state.global_step == update:
                setattr(control, name, True)
        return control


def test_callbacks_request_evaluations_checkpoints_and_the_end(tmp_path: Path) -> None:
    flagger = Flagger(should_evaluate=2, should_save=3, should_training_stop=5)
    result = fine_tuned(callbacks=[flagger], output_dir=str(tmp_path), keep_checkpoints=9).result
    assert (result.evaluation_updates, result.optimizer_steps) == ([2, 5], 5)
    assert {"update-00000003"} < set(checkpoints_of(tmp_path))
    again = fine_tuned(callbacks=[Flagger()], output_dir=str(tmp_path), resume="auto").result
    assert again.optimizer_steps == 5


def test_the_end_of_an_epoch_cannot_be_requested() -> None:
    with pytest.raises(CallbackError, match=r"Flagger set `should_epoch_stop` in `on_step_end`.*should_training_stop"):
        fine_tuned(callbacks=[Flagger(should_epoch_stop=2)])


def test_a_callback_cannot_switch_dropout_off() -> None:
    class Eval(TrainerCallback):
        modes: list[bool] = []  # noqa: RUF012

        def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
            model.eval()

        def on_evaluate(self, *_: Any, model: nn.Module, **__: Any) -> None:
            self.modes.append(model.training)
            model.train()

    options: dict[str, Any] = {"evaluate_every": 2, "max_updates": 3, "audit": False}
    assert fine_tuned(callbacks=[Eval(), Eval()], **options).differences(fine_tuned(**options)) == []
    assert Eval.modes == [False] * 4


class Raiser(TrainerCallback):
    def __init__(self, event: str) -> None:
        setattr(self, event, self._raise)

    def _raise(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step >= 3:
            raise KeyError("lost")


@pytest.mark.parametrize("event", some_slow(UPDATE_EVENTS, fast=["on_evaluate"]))
def test_a_callback_that_raises_ends_the_run_with_a_checkpoint(event: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"output_dir": str(tmp_path), "evaluate_every": 4, "n_epochs": 1}
    with pytest.raises(CallbackError, match=rf"The callback Raiser raised in `{event}` after update \d: KeyError") as e:
        fine_tuned(callbacks=[Raiser(event)], **options)
    assert isinstance(e.value.__cause__, KeyError)
    assert len(checkpoints_of(tmp_path)) == 1
    assert fine_tuned(**options, resume="auto").differences(fine_tuned(evaluate_every=4, n_epochs=1)) == []


@pytest.mark.slow
def test_a_callback_that_raises_at_the_end_costs_no_output(tmp_path: Path) -> None:
    with pytest.raises(CallbackError, match="on_train_end"):
        fine_tuned(callbacks=[Raiser("on_train_end")], output_dir=str(tmp_path))
    assert (tmp_path / "result.json").exists()
    assert (tmp_path / "model" / "config.json").exists()


class Counter(TrainerCallback, ExportableState):
    """A callback with a state: the sum of the norms it has seen."""

    def __init__(self) -> None:
        self.norms, self.epochs = 0.0, 0

    def on_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.norms += float(sum(p.grad.norm() for p in model.parameters() if p.grad is not None))

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.epochs += 1

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"norms": self.norms, "epochs": self.epochs}}


@pytest.mark.slow
def test_a_run_with_stateful_callbacks_resumes_to_the_last_bit(tmp_path: Path) -> None:
    def run(name: str, **more: Any) -> tuple[Any, Counter, Recorder]:
        counter, recorder = Counter(), Recorder()
        callbacks = [counter, ExponentialMovingAverage(0.8), recorder]
        options: dict[str, Any] = {"evaluate_every": 3, "restore_best_weights": True, "checkpoint_every": 1}
        run = fine_tuned(callbacks=callbacks, output_dir=str(tmp_path / name), **options, **more)
        return run, counter, recorder

    whole, counted, seen = run("whole")
    with pytest.raises(CutOff):
        run("cut", cut_off_at=10)
    again, recounted, reseen = run("cut", resume="auto")
    assert whole.differences(again) == []
    assert ledger_of(tmp_path / "cut") == ledger_of(tmp_path / "whole")
    assert (recounted.norms, recounted.epochs) == (counted.norms, counted.epochs)
    assert reseen.state.log_history == seen.state.log_history
    assert reseen.state.best_metric == seen.state.best_metric


def test_an_average_of_weights_is_evaluated_and_saved() -> None:
    followed, trained = model(), dict[str, torch.Tensor]()

    class Follow(TrainerCallback):
        """Computes the same average on its own."""

        def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
            self.average = {name: p.detach().clone() for name, p in model.named_parameters()}

        def on_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
            for name, p in model.named_parameters():
                self.average[name] = 0.8 * self.average[name] + 0.2 * p.detach()

        def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
            trained.update({name: p.detach().clone() for name, p in model.named_parameters()})

        def on_evaluate(self, *_: Any, model: nn.Module, **__: Any) -> None:
            for name, p in model.named_parameters():
                torch.testing.assert_close(p.detach(), self.average[name])

    follow = Follow()
    averaged = fine_tuned(followed, callbacks=[follow, ExponentialMovingAverage(0.8)], n_epochs=1)
    plain = fine_tuned(n_epochs=1)
    for name, p in followed.named_parameters():
        torch.testing.assert_close(p.detach(), follow.average[name])
        assert torch.equal(trained[name], plain.weights[name])  # training goes on with its own weights
    assert averaged.result.loss_history == plain.result.loss_history
    assert averaged.result.val_loss_history != plain.result.val_loss_history
    again = fine_tuned(followed, learning_rate=1e-12, n_epochs=1).result
    assert again.initial_loss == averaged.result.final_loss


def test_an_objective_of_ones_own_prunes_with_optuna() -> None:
    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=0.0))

    def objective(trial: optuna.Trial) -> float:
        return fine_tuned(callbacks=[OptunaPruning(trial)], evaluate_every=2).result.final_loss

    study.optimize(objective, n_trials=1)
    (trial,) = study.trials
    assert trial.state == optuna.trial.TrialState.PRUNED
    assert list(trial.intermediate_values) == [1]


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (PrinterCallback(), "`callbacks` must be a list of `transformers.TrainerCallback` objects, but is"),
        ([PrinterCallback], r"contains the class PrinterCallback. Give an object: `PrinterCallback\(\)`"),
        ([print], "must contain only `transformers.TrainerCallback` objects, but contains <built-in function print>"),
    ],
)
def test_bad_callbacks_are_refused_before_training(callbacks: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        fine_tuned(callbacks=callbacks)


@pytest.mark.slow
def test_flags_and_errors_on_one_of_two_processes_act_on_both(
    two_processes: Callable[..., str], tmp_path: Path
) -> None:
    printed = two_processes("callbacks_of_two.py", str(tmp_path))
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("FOUND "))[6:])
    outcomes = found["outcomes"]
    assert outcomes["should_training_stop"] == [[3, [3]]] * 2
    assert outcomes["should_evaluate"] == [[7, [3, 7]]] * 2
    assert outcomes["should_save"] == [[7, [7]]] * 2
    message = "The callback OnProcessOne raised in `on_step_end` after update 3: KeyError: 'lost'"
    assert outcomes["raise"] == [message] * 2
    assert "update-00000003" in found["checkpoints"]["should_save"]
    assert found["checkpoints"]["raise"] == ["update-00000003"]


def test_samples_are_generated_at_each_evaluation_without_changing_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    def run(*callbacks: TrainerCallback) -> tuple[Any, nn.Module]:
        trained: Any = causal_lm()
        for module in trained.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        result = test_fine_tuning(
            trained, train_data=Dataset.from_dict({"text": REVIEWS}), tokenizer=word_tokenizer(), n_epochs=2,
            evaluate_every=1, batch_size=2, callbacks=callbacks, progress=False,
        )  # fmt: skip
        return result, trained

    samples = GenerateSamples(["good film", "bad"], max_new_tokens=3, do_sample=True)
    (result, trained), (plain, untouched) = run(samples), run()
    assert [update for update, _ in samples.samples] == result.evaluation_updates
    assert all(len(texts) == 2 for _, texts in samples.samples)
    assert len({tuple(texts) for _, texts in samples.samples}) > 1  # other random numbers each time
    assert f"update 1: {samples.samples[0][1][0]}" in capsys.readouterr().out
    assert result.loss_history == plain.loss_history
    assert all(torch.equal(one, two) for one, two in zip(trained.parameters(), untouched.parameters(), strict=True))
    assert trained.training == untouched.training


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: GenerateSamples([]), "`prompts` must be texts, and at least one"),
        (lambda folder: GenerateSamples(folder / "none.txt"), "which cannot be read: .*No such file"),
        (lambda _: ExponentialMovingAverage(1.0), "`decay` must be a number from 0 to below 1, but is 1.0"),
    ],
)
def test_arguments_of_callbacks_are_checked(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        make(tmp_path)
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    assert GenerateSamples(tmp_path / "prompts.txt")._prompts == ["one", "two"]


@pytest.mark.slow
def test_samples_of_a_model_that_generates_no_text_are_refused() -> None:
    with pytest.raises(CallbackError, match="`GenerateSamples` needs a model that generates text, and its `tokenizer`"):
        fine_tuned(callbacks=[GenerateSamples(["good"])])


class Unsaveable(TrainerCallback):
    """A callback whose state cannot be saved: it raises, or contains a function."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        if isinstance(self._state, Exception):
            raise self._state
        return {"kept": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError(state)


@pytest.mark.slow
def test_a_callback_whose_state_cannot_be_saved_costs_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counter = Counter()
    callbacks = [Unsaveable(print), Unsaveable(KeyError("gone")), counter]
    fine_tuned(callbacks=callbacks, output_dir=str(tmp_path), n_epochs=1)
    told = capsys.readouterr().err
    assert "The state of the callback Unsaveable is not saved in checkpoints: it contains a builtin_function" in told
    assert (
        "The state of the callback Unsaveable 2 is not saved in checkpoints: taking it raised KeyError('gone')" in told
    )
    again = Counter()
    fine_tuned(callbacks=[Unsaveable(print), again], output_dir=str(tmp_path), n_epochs=1, resume="auto")
    assert again.norms == counter.norms > 0


def test_an_average_of_16_bit_weights_follows_small_changes() -> None:
    layer, average = nn.Linear(1, 1, bias=False).bfloat16(), ExponentialMovingAverage(0.999)
    average.on_init_end()
    nothing: Any = None
    with torch.no_grad():
        layer.weight.fill_(1.0)
        average.on_train_begin(nothing, nothing, nothing, model=layer)
        layer.weight.fill_(1.5)
    for _ in range(1000):
        average.on_optimizer_step(nothing, nothing, nothing, model=layer)
    with average.evaluation_weights(layer):
        assert layer.weight.item() == pytest.approx(1.5 - 0.5 * 0.999**1000, rel=1e-2)
    assert layer.weight.item() == 1.5


@pytest.mark.slow
def test_an_average_is_saved_although_another_callback_fails_at_the_end(tmp_path: Path) -> None:
    kept = ExponentialMovingAverage(0.8)
    with pytest.raises(CallbackError, match="on_train_end") as e:
        fine_tuned(callbacks=[Raiser("on_train_end"), kept], output_dir=str(tmp_path), keep_checkpoints=0)
    averaged = fine_tuned(callbacks=[ExponentialMovingAverage(0.8)])
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], averaged.weights[name]) for name in saved)
    assert e.value.result.loss_history == averaged.result.loss_history
    again = fine_tuned(callbacks=[ExponentialMovingAverage(0.8)], output_dir=str(tmp_path), resume="auto")
    assert averaged.differences(again) == []


@pytest.mark.slow
def test_a_callback_can_be_used_again_after_a_run_was_cut_off() -> None:
    average = ExponentialMovingAverage(0.5)
    with pytest.raises(CutOff):
        fine_tuned(callbacks=[average], cut_off_at=5)
    again = fine_tuned(callbacks=[average], n_epochs=1)
    assert fine_tuned(callbacks=[ExponentialMovingAverage(0.5)], n_epochs=1).differences(again) == []


@pytest.mark.slow
def test_a_request_at_the_end_of_an_epoch_is_not_lost() -> None:
    result = fine_tuned(callbacks=[Flagger(should_evaluate=7)], evaluate_every=1000).result
    assert result.evaluation_updates == [7, 14]


@pytest.mark.slow
def test_a_run_that_a_requested_evaluation_stopped_stays_ended(tmp_path: Path) -> None:
    class EveryOther(TrainerCallback):
        def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
            control.should_evaluate = state.global_step % 2 == 0

    arguments: dict[str, Any] = {
        "evaluate_every": 1000, "early_stopping_patience": 1, "early_stopping_min_delta": 1e6,
        "output_dir": str(tmp_path),
    }  # fmt: skip
    ended = fine_tuned(callbacks=[EveryOther()], **arguments)
    assert ended.result.evaluation_updates == [2, 4]
    assert ended.differences(fine_tuned(callbacks=[EveryOther()], **arguments, resume="auto")) == []


@pytest.mark.slow
def test_a_resumed_run_stops_where_the_uninterrupted_one_does(tmp_path: Path) -> None:
    class OnceAt(TrainerCallback):
        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step == 4:
                raise KeyError("once")

    arguments: dict[str, Any] = {
        "evaluate_every": 2, "early_stopping_patience": 1, "early_stopping_min_delta": 1e6,
    }  # fmt: skip
    whole = fine_tuned(**arguments)
    with pytest.raises(CallbackError):
        fine_tuned(callbacks=[OnceAt()], output_dir=str(tmp_path), **arguments)
    assert whole.differences(fine_tuned(output_dir=str(tmp_path), resume="auto", **arguments)) == []


@pytest.mark.slow
def test_a_stop_before_the_first_update_ends_the_run_after_it() -> None:
    class AtOnce(TrainerCallback):
        def on_train_begin(self, _: Any, __: Any, control: Any, **___: Any) -> None:
            control.should_training_stop = True

    assert fine_tuned(callbacks=[AtOnce()]).result.optimizer_steps == 1


@pytest.mark.slow
def test_a_state_that_a_callback_cannot_restore_is_reported_with_its_name(tmp_path: Path) -> None:
    class Picky(TrainerCallback):
        def state_dict(self) -> dict[str, Any]:
            return {"n": 1}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError(state["missing"])

    fine_tuned(callbacks=[Picky()], output_dir=str(tmp_path), n_epochs=1)
    with pytest.raises(CallbackError, match=r"The callback \S*Picky raised while restoring the state"):
        fine_tuned(callbacks=[Picky()], output_dir=str(tmp_path), n_epochs=1, resume="auto")


class Once(TrainerCallback):
    """Raises in an event, the first time that four updates are done."""

    def __init__(self, event: str) -> None:
        self.raised = False
        setattr(self, event, self._raise)

    def _raise(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step == 4 and not self.raised:
            self.raised = True
            raise OSError


@pytest.mark.parametrize("event", some_slow(["on_pre_optimizer_step", "on_step_begin", "on_save"], fast=["on_save"]))
def test_an_error_in_one_callback_costs_no_update_of_another(event: str, tmp_path: Path) -> None:
    def run(*callbacks: TrainerCallback, **more: Any) -> Any:
        return fine_tuned(callbacks=[*callbacks, ExponentialMovingAverage(0.5)], checkpoint_every=4, n_epochs=1, **more)

    once = Once(event)
    with pytest.raises(CallbackError, match=event):
        run(once, output_dir=str(tmp_path))
    assert run().differences(run(once, output_dir=str(tmp_path), resume="auto")) == []


@pytest.mark.slow
def test_random_numbers_drawn_while_saving_do_not_change_a_resumed_run(tmp_path: Path) -> None:
    class Draws(TrainerCallback):
        def on_save(self, *_: Any, **__: Any) -> None:
            torch.rand(5)

    arguments: dict[str, Any] = {"checkpoint_every": 3, "n_epochs": 1}
    whole = fine_tuned(callbacks=[Draws()], output_dir=str(tmp_path / "whole"), **arguments)
    with pytest.raises(CutOff):
        fine_tuned(callbacks=[Draws()], output_dir=str(tmp_path / "cut"), cut_off_at=5, **arguments)
    again = fine_tuned(callbacks=[Draws()], output_dir=str(tmp_path / "cut"), resume="auto", **arguments)
    assert whole.differences(again) == []


@pytest.mark.slow
def test_a_run_that_a_callback_stopped_stays_ended_without_it(tmp_path: Path) -> None:
    fine_tuned(callbacks=[Flagger(should_training_stop=3)], output_dir=str(tmp_path))
    assert fine_tuned(output_dir=str(tmp_path), resume="auto").result.optimizer_steps == 3
    more = fine_tuned(output_dir=str(tmp_path), resume="auto", n_epochs=3, allow_changed="n_epochs").result
    assert more.optimizer_steps == 21


@pytest.mark.slow
def test_callbacks_see_and_change_gradients_that_are_summed_in_float32() -> None:
    class Zeroes(TrainerCallback):
        def __init__(self) -> None:
            self.norms: list[float] = []

        def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            self.norms.append(float(torch.stack([g.float().norm() for g in gradients]).norm()))
            for gradient in gradients:
                gradient.zero_()

    def run(*callbacks: TrainerCallback) -> Any:
        return fine_tuned(
            model().bfloat16(), callbacks=callbacks, accumulate_in_fp32=True, weight_decay=0.0, warmup_steps=0,
            max_updates=3, learning_rate=0.1,
        )  # fmt: skip

    zeroes, start = Zeroes(), model().bfloat16()
    stopped = run(zeroes)
    assert zeroes.norms == pytest.approx(stopped.result.grad_norm_history, rel=1e-2)
    assert all(torch.equal(p, stopped.weights[name]) for name, p in start.named_parameters())
    assert run(Recorder()).differences(run()) == []


@pytest.mark.slow
def test_the_rate_that_a_callback_sets_is_recorded() -> None:
    class Halves(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, optimizer: torch.optim.Optimizer, **__: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] *= 0.5

    usual = fine_tuned(max_updates=3, warmup_steps=0).result
    halved = fine_tuned(max_updates=3, warmup_steps=0, callbacks=[Halves()]).result
    assert halved.lr_history == pytest.approx([0.5 * rate for rate in usual.lr_history])


def test_an_average_begins_with_weights_when_they_are_unfrozen() -> None:
    average, trained = ExponentialMovingAverage(0.5), nn.Linear(2, 2)
    trained.bias.requires_grad_(False)
    given: tuple[Any, Any, Any] = (None, None, None)
    average.on_train_begin(*given, model=trained)
    trained.bias.requires_grad_(True)
    average.on_optimizer_step(*given, model=trained)
    bias = trained.bias.detach().clone()
    with torch.no_grad():
        trained.bias += 1.0
    average.on_optimizer_step(*given, model=trained)
    with average.evaluation_weights(trained):
        torch.testing.assert_close(trained.bias.detach(), bias + 0.5)
    torch.testing.assert_close(trained.bias.detach(), bias + 1.0)


def test_callbacks_that_a_resumed_run_adds_or_lacks_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    saved = {"ExponentialMovingAverage": {"state_dict": ExponentialMovingAverage(0.9).state_dict()}}
    with run_logging(enabled=True, verbosity="quiet"):
        restore_states([], saved)
        restore_states([ExponentialMovingAverage(0.9)], {})
        restore_states([ExponentialMovingAverage(0.5)], saved)
    told = capsys.readouterr().err
    assert "a state of the callback ExponentialMovingAverage, but `callbacks` has no such one now" in told
    assert "no state of the callback ExponentialMovingAverage, which begins with a fresh one" in told
    assert "weights is 0.5. Before the run resumed, it was 0.9." in told
