"""Callbacks of Transformers, TRL and W&B, unchanged, and the arguments that they read."""

import ast
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
import transformers.integrations.integration_utils as integrations
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ftaccum.runtime.accelerator import fresh_accelerate_state
from ftaccum.training.trainer_arguments import CallbackArguments
from heads import HEADS
from interrupted import fine_tuned

MODULES = ("integrations/integration_utils.py", "trainer_callback.py", "utils/notebook.py")


def model() -> nn.Module:
    return HEADS["sequence classification, BERT"].model().float()


class Keep(TrainerCallback):
    """Keeps the arguments and the state."""

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self.args, self.state = args, state


def kept(**arguments: Any) -> tuple[CallbackArguments, TrainerState]:
    keep = Keep()
    fine_tuned(callbacks=[keep], max_updates=1, audit=False, **arguments)
    return keep.args, keep.state


def plain_arguments() -> TrainingArguments:
    with fresh_accelerate_state():
        return TrainingArguments("folder", eval_strategy="steps", eval_steps=4, report_to="none", use_cpu=True)


def attributes_read(name: str) -> set[str]:
    """Return the names X of `args.X` in the callbacks of a module of Transformers."""
    source = (Path(transformers.__file__).parent / name).read_text(encoding="utf-8")
    classes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef)]
    nodes = [node for each in classes if each.name.endswith("Callback") for node in ast.walk(each)]
    reads = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    return {node.attr for node in reads if isinstance(node.value, ast.Name) and node.value.id == "args"}


def test_arguments_have_all_that_callbacks_of_transformers_read() -> None:
    plain, (arguments, _) = plain_arguments(), kept()
    read = set().union(*map(attributes_read, MODULES))
    assert {"output_dir", "run_name", "metric_for_best_model", "eval_strategy"} < read
    assert {name for name in read if hasattr(plain, name) and not hasattr(arguments, name)} == set()


def test_arguments_have_the_attributes_of_trainers_and_of_the_same_types() -> None:
    plain, (arguments, _) = vars(plain_arguments()), kept(evaluate_every=4, restore_best_weights=True)
    ours = vars(arguments)
    assert plain.keys() - ours.keys() == set()
    of_types = {name: (plain[name], ours[name]) for name in plain if type(plain[name]) is not type(ours[name])}
    # The state of processes is only read; the others are None or a float by default, or empty.
    differing = {"distributed_state", "greater_is_better", "metric_for_best_model", "num_train_epochs"}
    assert of_types.keys() <= differing | {"save_total_limit", "fsdp", "fsdp_config"}
    assert arguments.to_sanitized_dict()["train_batch_size"] == 2
    assert '"per_device_train_batch_size": 2' in arguments.to_json_string()
    assert "per_device_train_batch_size=2" in repr(arguments)


def test_a_share_of_an_epoch_is_given_as_a_share_of_the_training() -> None:
    arguments, state = kept(evaluate_every=0.5, log_every=3)
    assert (arguments.eval_strategy, arguments.eval_steps) == (IntervalStrategy.STEPS, 0.25)
    assert (state.logging_steps, state.eval_steps) == (3, 1)
    arguments, state = kept(evaluate_every=4)
    assert (arguments.eval_steps, state.eval_steps) == (4, 4)


def test_making_the_arguments_initialises_no_device_and_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}
    of_run = CallbackArguments.of_run

    def watched(*args: Any, **kwargs: Any) -> CallbackArguments:
        before = dict(accelerate.PartialState._shared_state)
        with monkeypatch.context() as patched:
            for name in ("_lazy_init", "set_device", "is_available", "device_count"):
                patched.setattr(torch.cuda, name, lambda *_, name=name: found.setdefault("cuda", name))
            patched.setattr(torch.distributed, "init_process_group", lambda *_, **__: found.setdefault("group", 1))
            arguments = of_run(*args, **kwargs)
            read = (arguments.device, arguments.n_gpu, arguments.world_size, arguments.parallel_mode.value)
        found["read"] = read
        found["same"] = accelerate.PartialState._shared_state == before
        return arguments

    monkeypatch.setattr(CallbackArguments, "of_run", watched)
    kept()
    assert found == {"read": (torch.device("cpu"), 0, 1, "not_parallel"), "same": True}


def test_callbacks_of_trl_run_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    average = trl.BEMACallback(update_freq=2, bias_power=50.0, min_ema_multiplier=0.5)
    trained = model()
    callbacks = [trl.RichProgressCallback(), average]
    fine_tuned(trained, callbacks=callbacks, max_updates=4, log_every=2, output_dir=str(tmp_path), audit=False)
    printed = capsys.readouterr().out
    assert "Step 4" in printed
    assert "eval_loss" in printed
    saved = type(trained).from_pretrained(tmp_path / "bema")
    distances = [(p - q).abs().max().item() for p, q in zip(trained.parameters(), saved.parameters(), strict=True)]
    assert 0 < max(distances) < 0.01


def test_the_callback_for_tensorboard_runs_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    monkeypatch.chdir(tmp_path)
    fine_tuned(callbacks=[integrations.TensorBoardCallback()], max_updates=2, log_every=1, audit=False)
    (events,) = (tmp_path / "trainer_output").rglob("events.out.tfevents.*")  # where Trainer writes by default
    written = events.read_bytes()
    assert all(name in written for name in (b"train/loss", b"eval/loss", b"per_device_train_batch_size"))


@pytest.mark.slow
def test_the_callback_for_wandb_runs_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="W&B is not installed")
    monkeypatch.chdir(tmp_path)
    for name, value in {"MODE": "offline", "SILENT": "true", "LOG_MODEL": "end", "WATCH": "gradients"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    callbacks = [integrations.WandbCallback()]
    result = fine_tuned(model(), callbacks=callbacks, evaluate_every=4, log_every=2, restore_best_weights=True).result
    config, summary = dict(wandb.run.config), dict(wandb.run.summary)
    wandb.finish()
    assert config["per_device_train_batch_size"] == 2
    assert summary["eval/loss"] == result.val_loss_history[-1]
    assert summary["train/global_step"] == 14
    assert "train/loss" in summary
