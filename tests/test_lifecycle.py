"""A run as the user sees it: counts, histories, screen, files, precisions, and a process with its state restored."""

import copy
import gc
import json
import math
import random
import threading
import weakref
from pathlib import Path
from typing import Any

import accelerate.state
import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_model
from torch import nn
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from ftaccum import DataError, Result, SettingsError, test_fine_tuning
from ftaccum.planning.batch_size import BatchSizes
from ftaccum.tracking.ledger import EvaluationEntry, Ledger, WindowEntry
from ftaccum.tracking.selection import Criterion
from heads import HEADS, one_batch
from training_passes import is_training_pass

CLASSIFIER, CAUSAL = HEADS["sequence classification, BERT"], HEADS["causal LM, Llama"]


def run(model: nn.Module | None = None, n_rows: int = 24, **arguments: Any) -> Result:
    defaults = {"n_epochs": 1, "validation_split": 0.0, "batch_size": 2, "effective_batch_size": 8, "progress": False}
    model = model if model is not None else CLASSIFIER.model().float()
    return test_fine_tuning(model, train_data=CLASSIFIER.rows(n_rows), **(defaults | arguments))


@pytest.mark.parametrize(("micro_batches", "k", "updates"), [(100, 4, 25), (10, 3, 4), (5, 8, 1)])
@pytest.mark.slow
def test_each_update_has_one_gradient_norm(micro_batches: int, k: int, updates: int) -> None:
    result = run(n_rows=micro_batches * 2, gradient_accumulation_steps=k, effective_batch_size=None)
    assert len(result.grad_norm_history) == len(result.loss_history) == len(result.lr_history) == updates
    assert result.optimizer_steps == updates
    assert result.skipped_steps == 0
    assert result.gradient_accumulation_steps == k


def test_reported_loss_does_not_depend_on_k() -> None:
    whole = run(n_rows=70, batch_size=32, effective_batch_size=None)
    accumulated = run(n_rows=70, batch_size=4, gradient_accumulation_steps=8, effective_batch_size=None)
    assert accumulated.loss_history == pytest.approx(whole.loss_history, rel=1e-6)
    assert accumulated.grad_norm_history == pytest.approx(whole.grad_norm_history, rel=1e-5)


def test_the_schedule_counts_updates_and_ends_at_the_last_one() -> None:
    result = run(n_rows=40, n_epochs=2, learning_rate=1.0e-3, warmup_ratio=0.2)
    assert result.lr_history == pytest.approx([0, 0.5e-3, *(1e-3 * n / 8 for n in range(8, 0, -1))])


def test_clipping_can_be_turned_off_and_norms_are_recorded_before_it() -> None:
    clipped, free = run(gradient_clip_norm=1e-3), run(gradient_clip_norm=None)
    assert clipped.grad_norm_history[0] == free.grad_norm_history[0] > 1e-3


def test_a_result_is_a_mapping_that_can_be_printed_and_saved_as_json(tmp_path: Path) -> None:
    result = run(validation_split=0.25)
    assert result["final_loss"] == result.final_loss == result.val_loss_history[-1]
    assert set(result) >= {"initial_loss", "best_val_loss", "metrics", "tokens_per_second", "final_loss_scale"}
    assert "nothing" not in result
    with pytest.raises(KeyError):
        result["nothing"]
    assert "final loss" in str(result)
    result.save(tmp_path / "r.json")
    assert dict(Result.load(tmp_path / "r.json")) == dict(result)


def test_without_validation_rows_the_losses_are_training_losses() -> None:
    result = run(n_epochs=2)
    assert result.final_loss == result.train_loss_history[-1]
    assert result.initial_loss == result.loss_history[0]
    assert result.best_val_loss is None
    assert result.val_loss_history == []


@pytest.mark.slow
def test_the_banner_shows_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    run(n_rows=1000, batch_size=4, gradient_accumulation_steps=8, effective_batch_size=None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "FINE-TUNING TEST"
    for line in (
        "Training samples: 1000",
        "Batch size: 4",
        "Gradient accumulation steps: 8",
        "Effective batch size: 32",
        "Processes: 1",
        "Precision: full, on cpu",
    ):
        assert line in lines
    assert any(line.startswith("Updates per epoch: 32") for line in lines)


def test_outputs_are_saved_and_load_again(tmp_path: Path) -> None:
    model = CLASSIFIER.model().float()
    result = run(model, output_dir=str(tmp_path), n_epochs=2)
    entries = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [e["loss"] for e in entries if "grad_norm" in e] == result.loss_history
    assert [e["train_loss"] for e in entries if "train_loss" in e] == result.train_loss_history
    assert Result.load(tmp_path / "result.json") == Result.load(tmp_path) == result
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    batch = one_batch(CLASSIFIER.rows(3))
    assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)


def test_a_plain_module_with_tied_weights_is_saved(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(61, 8), nn.Linear(8, 61, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(input_ids))

    model, again = Tied(), Tied()
    rows = [torch.arange(1, 9)] * 4
    test_fine_tuning(model, train_data=rows, validation_split=0.0, n_epochs=1, output_dir=str(tmp_path), progress=False)
    load_model(again, str(tmp_path / "model" / "model.safetensors"))
    assert torch.equal(again.head.weight, model.head.weight)


@pytest.mark.slow
def test_runs_of_different_precision_can_follow_each_other_in_one_process() -> None:
    runs = [run(mixed_precision=precision) for precision in ("no", "bf16", "no", "fp16", None)]
    assert [r.amp_enabled for r in runs] == [False, True, False, True, False]
    assert runs[0].loss_history == runs[2].loss_history == runs[4].loss_history
    assert runs[1].loss_history != runs[0].loss_history
    assert runs[1].loss_history == pytest.approx(runs[0].loss_history, rel=2e-2)
    assert runs[3].final_loss_scale == 2.0**16
    assert runs[0].final_loss_scale is None
    assert run(use_amp=True).amp_enabled


def test_an_fp16_overflow_skips_the_update_and_moves_neither_weights_nor_schedule(tmp_path: Path) -> None:
    def overflowing_once(outputs: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        loss = nn.functional.cross_entropy(outputs.logits, batch["labels"])
        # The first forward passes measure the loss. The first update overflows.
        return loss * 1e38 * 10 if len(calls) == overflow_at else loss

    calls: list[int] = []
    overflow_at = 0
    model = CLASSIFIER.model().float()
    run(model, loss_fn=overflowing_once, n_rows=8, effective_batch_size=4, mixed_precision="fp16", audit=False)
    overflow_at, calls = len(calls) - 3, []  # four passes in two windows: the first of the first window
    model = CLASSIFIER.model().float()
    result = run(
        model, loss_fn=overflowing_once, n_rows=8, effective_batch_size=4, mixed_precision="fp16", learning_rate=1e-3,
        audit=False,
    )  # fmt: skip
    assert (result.optimizer_steps, result.skipped_steps) == (1, 1)
    assert not math.isfinite(result.grad_norm_history[0])
    assert result.lr_history == [1e-3, 1e-3]
    assert result.final_loss_scale == 2.0**15
    assert all(p.isfinite().all() for p in model.parameters())
    result.save(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["grad_norm_history"][0] is None


def test_fp16_with_a_scaler_has_the_gradient_norms_of_full_precision() -> None:
    full, scaled = run(n_rows=8), run(n_rows=8, mixed_precision="fp16")
    assert scaled.grad_norm_history == pytest.approx(full.grad_norm_history, rel=1e-2)


def test_early_stopping_restores_the_best_weights(capsys: pytest.CaptureFixture[str]) -> None:
    model = CLASSIFIER.model().float()
    result = run(
        model, validation_split=0.3, n_epochs=12, learning_rate=0.05, early_stopping_patience=2,
        restore_best_weights=True,
    )  # fmt: skip
    message = f"Restored the weights of update {result.best_update}, with validation loss {result.best_val_loss:.4f}."
    assert message in capsys.readouterr().err
    best = result.val_loss_history.index(min(result.val_loss_history))
    assert len(result.val_loss_history) == best + 3 < 12
    assert result.best_val_loss == result.val_loss_history[best] < result.final_loss
    again = run(model, val_data=None, validation_split=0.3, learning_rate=1e-12)
    assert again.initial_loss == pytest.approx(result.best_val_loss, rel=1e-6)


def test_a_run_leaves_no_trace_in_the_model_or_the_process() -> None:
    model = CAUSAL.model().float().eval()
    model.model.layers[0].train()
    model.config.use_cache = True
    attributes = set(model.__dict__)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    test_fine_tuning(
        model, train_data=CAUSAL.rows(), n_epochs=1, use_amp=True, gradient_checkpointing=True, deterministic=True,
        progress=False,
    )  # fmt: skip
    assert set(model.__dict__) - attributes <= {"_require_grads_hooks"}  # an empty list that Transformers adds
    assert not model.get_input_embeddings()._forward_hooks
    assert model.forward.__func__ is type(model).forward
    assert [m.training for m in (model, model.model.layers[0], model.model.layers[1])] == [False, True, False]
    assert model.config.use_cache is True
    assert not torch.are_deterministic_algorithms_enabled()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert accelerate.state.AcceleratorState._shared_state == {}


def test_a_failed_run_leaves_no_trace_in_the_model_or_the_process() -> None:
    model = CLASSIFIER.model().float().eval()

    def fails(outputs: Any, batch: Any) -> torch.Tensor:
        if is_training_pass():
            raise RuntimeError("in the middle")
        return nn.functional.cross_entropy(outputs.logits, batch["labels"])

    with pytest.raises(RuntimeError, match="in the middle"):
        run(model, loss_fn=fails, use_amp=True)
    assert not model.training
    assert "forward" not in model.__dict__
    assert accelerate.state.AcceleratorState._shared_state == {}


def test_an_existing_accelerator_is_not_changed() -> None:
    mine = accelerate.Accelerator(cpu=True)
    run(mixed_precision="bf16")
    assert mine.mixed_precision == "no"
    assert mine.state.device.type == "cpu"
    accelerate.state.AcceleratorState._reset_state()


def test_a_distributed_backend_not_shown_to_be_exact_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate.Accelerator, "distributed_type", accelerate.DistributedType.FSDP)
    with pytest.raises(SettingsError, match="Accelerate is configured for FSDP, but ftaccum has not been shown"):
        run()
    assert accelerate.state.AcceleratorState._shared_state == {}


def test_runs_with_the_same_seed_are_equal_and_dropout_is_on() -> None:
    def one(seed: int, dropout: float) -> list[float]:
        model = CLASSIFIER.model().float()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        return run(model, random_seed=seed, audit=False).loss_history

    first = one(1, 0.3)
    assert first == one(1, 0.3) != one(2, 0.3)
    assert first != one(1, 0.0)


@pytest.mark.slow
def test_memory_does_not_grow_over_twenty_runs() -> None:
    model = CLASSIFIER.model().float()
    sizes, objects = [], []
    for number in range(20):
        run(model, n_rows=8, mixed_precision=("no", "bf16")[number % 2])
        gc.collect()
        objects.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
        sizes.append(psutil.Process().memory_info().rss)
    assert objects[-1] == objects[3]
    assert sizes[-1] - sizes[3] < 20 * 2**20


def test_a_run_leaves_nothing_for_the_garbage_collector() -> None:
    left: list[weakref.ref[Any]] = []

    def adam(groups: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(groups)
        left.append(weakref.ref(optimizer))
        return optimizer

    def call() -> None:
        model = CLASSIFIER.model().float()
        left.append(weakref.ref(model))
        run(model, optimizer=adam)

    gc.disable()
    try:
        call()
        assert [ref() for ref in left] == [None, None]
    finally:
        gc.enable()


@pytest.mark.slow
def test_custom_optimizers_are_used() -> None:
    model = CLASSIFIER.model().float()
    kept = torch.optim.SGD(model.parameters(), lr=0.25)
    assert run(model, optimizer=kept).lr_history == pytest.approx([0.25, 0.25 * 2 / 3, 0.25 / 3])
    assert run(model, optimizer=kept, lr_scheduler="constant").lr_history == [0.25] * 3
    made = run(
        optimizer=lambda groups: torch.optim.SGD(groups, momentum=0.9), learning_rate=0.1, lr_scheduler="constant"
    )
    assert made.lr_history == [0.1] * 3


class Tracker(accelerate.tracking.GeneralTracker):
    name, requires_logging_directory = "kept", False

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.finished = 0

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int, **_: Any) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished += 1


def test_trackers_get_every_update_and_every_epoch_with_the_batch_sizes() -> None:
    tracker = Tracker()
    result = run(validation_split=0.25, n_epochs=2, log_with=tracker, log_every=1)
    assert tracker.config["learning_rate"] == 5e-5
    updates = [(values["train/loss"], step) for values, step in tracker.logged if "train/loss" in values]
    assert updates == list(zip(result.loss_history, range(1, 7), strict=True))
    evaluations = [values["val/loss"] for values, _ in tracker.logged if "val/loss" in values]
    assert evaluations == [result.initial_loss, *result.val_loss_history]
    epochs = [values for values, _ in tracker.logged if "epoch" in values]
    assert {k: v for k, v in epochs[0].items() if k.startswith("config/")} == {
        "config/effective_batch_size": 8,
        "config/gradient_accumulation_steps": 4,
        "config/physical_batch_size": 2,
    }
    assert tracker.finished == 1


def test_a_tracker_that_cannot_be_copied_is_accepted() -> None:
    tracker = Tracker()
    tracker.lock = threading.Lock()
    assert run(log_with=tracker).optimizer_steps == 3


def test_a_best_evaluation_is_found_among_those_that_diverged() -> None:
    losses = iter([math.nan, 0.5, math.inf])
    ledger = Ledger()
    ledger.record(WindowEntry(0, 0, 1, 1.0, {}, 1.0, 1.0, False, passes=1))
    for epoch in range(3):
        ledger.record(EvaluationEntry(epoch + 1, epoch, 1, 1.0, next(losses), {"accuracy": math.nan}))
    result = Result.of(
        ledger, BatchSizes(1, 1, 1, 1), Criterion(), training_time=1.0,
        out_of_memory=0, amp_enabled=False, final_loss_scale=None, output_dir=None,
    )  # fmt: skip
    assert (result.best_val_loss, result.best_update) == (0.5, 2)
    assert "accuracy nan" in str(result)


def test_tokens_per_update_gives_rows_by_the_mean_length() -> None:
    rows = [torch.arange(1, 9)] * 20
    result = test_fine_tuning(
        CAUSAL.model(), train_data=rows, validation_split=0.0, n_epochs=1, tokens_per_update=64, progress=False
    )
    assert (result.effective_batch_size, result.gradient_accumulation_steps, result.optimizer_steps) == (8, 2, 3)


def test_labels_that_were_refused_do_not_set_the_problem_type() -> None:
    head = HEADS["sequence classification, BERT"]
    model, rows = BertForSequenceClassification(copy.deepcopy(head.config)), head.rows(8)
    model.config.problem_type = None  # other tests may have set that of the head
    arguments = {"validation_split": 0.0, "n_epochs": 1, "progress": False}
    with pytest.raises(DataError, match="cannot be computed"):
        test_fine_tuning(model, train_data=[{**row, "labels": float(row["labels"])} for row in rows], **arguments)
    assert model.config.problem_type is None
    test_fine_tuning(model, train_data=rows, **arguments)
    assert model.config.problem_type == "single_label_classification"


def test_early_stopping_without_a_finite_validation_loss_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(torch.ones(4), n % 3) for n in range(8)]
    result = test_fine_tuning(
        nn.Linear(4, 3), train_data=rows, val_data=[*rows, (torch.full((4,), math.nan), 0)], n_epochs=3,
        loss_fn=nn.CrossEntropyLoss(), early_stopping_patience=1, restore_best_weights=True, progress=False,
    )  # fmt: skip
    assert len(result.val_loss_history) == 1
    assert (
        "Stopped early: no finite validation loss in 1 evaluations, so there is no best evaluation."
        in capsys.readouterr().err
    )
