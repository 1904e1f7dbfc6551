"""`exact(Trainer)` on one process: the gradient of each window is that of one batch, and the rest of Trainer works."""

import contextlib
import inspect
import json
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import (
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    set_seed,
)

from ftaccum import InexactLossWarning, exact
from heads import HEADS, IGNORED, RecordingOptimizer, Row, all_in_float64, one_batch
from interrupted import model as dropout_model
from trained_windows import errors_of, read_window_errors, same_as_one_batch
from trainers import Listed, arguments, gradients, window_errors

ExactTrainer = exact(Trainer)
CLASSIFIER = HEADS["sequence classification, BERT"]
TOKENS = HEADS["token classification, BERT"]
LOGGED = 1e-6  # Trainer adds the losses up in float32
FAR = 0.1
SLOW = pytest.mark.slow


def below(errors: tuple[list[float], list[float]], tolerance: float = 1e-10) -> bool:
    gradient, loss = errors
    assert len(gradient) > 1
    return max(gradient) < tolerance and max(loss) < max(LOGGED, tolerance)


# ---- Heads -----------------------------------------------------------------------------------------------------------

FAST = ["sequence classification, BERT", "token classification, RoBERTa", "causal LM, GPT-2"]


@pytest.mark.parametrize("name", FAST)
def test_windows_have_the_gradient_and_the_loss_of_one_batch(name: str) -> None:
    head = HEADS[name]
    with all_in_float64():
        assert below(window_errors(ExactTrainer, head.model(), head.rows(), size=4))


def test_an_unchanged_trainer_is_far_off_in_the_same_harness() -> None:
    gradient, loss = window_errors(Trainer, CLASSIFIER.model(), CLASSIFIER.rows(), size=4)
    assert max(gradient) > FAR
    assert max(loss) > FAR


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_full_and_short_windows_of_every_head_are_exact(name: str) -> None:
    """Micro-batches of 2 and 3 rows; the last window has fewer micro-batches, and the last of them fewer rows."""
    head = HEADS[name]
    with all_in_float64():
        for batch_size, k in ((2, 2), (3, 2), (1, 4)):
            sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": k}
            assert below(window_errors(ExactTrainer, head.model(), head.rows(11), size=batch_size * k, **sizes))


def test_a_seq2seq_trainer_is_exact() -> None:
    head = HEADS["seq2seq, BART"]
    usual = arguments("unused").to_dict()
    given = {name: usual[name] for name in ("max_grad_norm", "logging_steps", "use_cpu", "report_to", "disable_tqdm")}
    given |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    given |= {"train_sampling_strategy": "sequential", "remove_unused_columns": False, "save_strategy": "no"}
    model, rows = head.model(), head.rows()
    optimizer = RecordingOptimizer(model)
    trainer = exact(Seq2SeqTrainer)(
        model=model, args=Seq2SeqTrainingArguments("unused", **given), train_dataset=Listed(rows),
        data_collator=one_batch, optimizers=(optimizer, LambdaLR(optimizer, lambda _: 1.0)),
    )  # fmt: skip
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert below(errors_of(optimizer.gradients, logged, model, [rows[:4], rows[4:8], rows[8:]]))


# ---- The order of rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "batch_rebalance"])
def test_every_row_counts_once_in_each_epoch_in_any_order(strategy: str) -> None:
    """Ten rows leave two for the last window, which `batch_rebalance` fills up to its four micro-batches."""
    given: dict[str, Any] = {"k": 4, "num_train_epochs": 2, "train_sampling_strategy": strategy}
    gradient, loss, windows = read_window_errors(ExactTrainer, CLASSIFIER.model(), CLASSIFIER.rows(10), **given)
    assert below((gradient, loss))
    assert [len(window) for window in windows] == [8, 2, 8, 2]
    assert sorted(chain(*windows[:2])) == sorted(chain(*windows[2:])) == list(range(10))


def test_batch_rebalance_repeats_rows_in_an_unchanged_trainer() -> None:
    """Trainer is exact for this head, were it not for these rows."""
    head = HEADS["causal LM, Llama"]
    given: dict[str, Any] = {"k": 4, "train_sampling_strategy": "batch_rebalance"}
    with all_in_float64():
        gradient, *_ = read_window_errors(Trainer, head.model(), head.rows(10), **given)
        assert gradient[0] < 1e-10
        assert gradient[1] > FAR
        assert max(read_window_errors(ExactTrainer, head.model(), head.rows(10), **given)[0]) < 1e-10


@pytest.mark.parametrize("n_rows", [3, *(pytest.param(n, marks=SLOW) for n in (5, 8, 13))])
def test_batch_rebalance_counts_every_row_once_at_any_number_of_rows(n_rows: int) -> None:
    given = {"k": 4, "train_sampling_strategy": "batch_rebalance", "num_train_epochs": 2}
    gradient, _, windows = read_window_errors(ExactTrainer, CLASSIFIER.model(), CLASSIFIER.rows(n_rows), **given)
    assert max(gradient) < 1e-10
    assert sorted(chain(*windows)) == sorted([*range(n_rows)] * 2)


def test_batch_rebalance_with_drop_last_leaves_out_the_last_rows() -> None:
    given = {"k": 4, "train_sampling_strategy": "batch_rebalance", "dataloader_drop_last": True}
    gradient, _, windows = read_window_errors(ExactTrainer, CLASSIFIER.model(), CLASSIFIER.rows(17), **given)
    assert max(gradient) < 1e-10
    assert [len(window) for window in windows] == [8, 8]


def test_split_batches_on_one_process_are_exact() -> None:
    given = {"accelerator_config": {"split_batches": True}}
    assert below(window_errors(ExactTrainer, CLASSIFIER.model(), CLASSIFIER.rows(), size=4, **given))


class Streamed(IterableDataset[Row]):
    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


@pytest.mark.parametrize("n_rows", [9, pytest.param(10, marks=SLOW)])
def test_a_stream_that_ends_within_a_window_is_exact(n_rows: int) -> None:
    """The last window of the second epoch has fewer micro-batches than `max_steps` lets Trainer expect."""
    model, rows = CLASSIFIER.model(), CLASSIFIER.rows(n_rows)
    found, logged = gradients(ExactTrainer, model, Streamed(rows), max_steps=6)
    assert below(errors_of(found, logged, model, [rows[:4], rows[4:8], rows[8:]] * 2))


@pytest.mark.slow
def test_windows_read_by_workers_are_exact() -> None:
    given = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    assert below(window_errors(ExactTrainer, CLASSIFIER.model(), CLASSIFIER.rows(), size=4, **given))


# ---- Losses ----------------------------------------------------------------------------------------------------------


def smoothed(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits, labels = model(**batch).logits, batch["labels"]
    if isinstance(model, GPT2LMHeadModel):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.2)


@pytest.mark.parametrize("name", ["token classification, BERT", "causal LM, GPT-2"])
def test_label_smoothing_is_exact(name: str) -> None:
    """Trainer adds up a part of this loss in float32, which an audit of a model in float64 would report."""
    head, unaudited = HEADS[name], exact(audit=False)(Trainer)
    model, rows = head.model(), head.rows()
    windows = [rows[:4], rows[4:8], rows[8:]]
    with all_in_float64():
        ours, theirs = (gradients(c, model, rows, label_smoothing_factor=0.2) for c in (unaudited, Trainer))
        assert below(errors_of(*ours, model, windows, loss=smoothed), 1e-6)
        if name == "causal LM, GPT-2":  # whose first label, which does not count, Trainer counts
            assert max(errors_of(*theirs, model, windows, loss=smoothed)[0]) > 0.01


def _summed(outputs: Any, labels: Tensor) -> Tensor:
    logits = outputs["logits"].flatten(0, -2)
    return nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")


def always_divided(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return _summed(outputs, labels) / num_items_in_batch


def divided_by_a_tensor(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return _summed(outputs, labels) / num_items_in_batch.clamp(min=1)


def else_a_mean(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    n_items = labels.ne(IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return _summed(outputs, labels) / n_items


def never_told(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:  # noqa: ARG001
    return _summed(outputs, labels) / labels.ne(IGNORED).sum()


@pytest.mark.parametrize("function", [always_divided, divided_by_a_tensor, else_a_mean, never_told])
def test_a_loss_function_of_every_kind_is_exact(function: Any) -> None:
    parts = {"compute_loss_func": function}
    assert below(window_errors(ExactTrainer, TOKENS.model(), TOKENS.rows(), size=4, parts=parts))


def test_an_unchanged_trainer_is_far_off_for_a_loss_function_that_takes_no_count() -> None:
    gradient, _ = window_errors(Trainer, TOKENS.model(), TOKENS.rows(), size=4, parts={"compute_loss_func": never_told})
    assert max(gradient) > FAR


class Mistaken(Trainer):
    """A Trainer with a mistake that has nothing to do with counts."""

    def compute_loss(self, *_: Any, **__: Any) -> Any:
        return self.nothing_of_this_name  # type: ignore[attr-defined]


@pytest.mark.parametrize("of_function", [True, False])
def test_a_loss_with_a_mistake_raises_its_own_error(of_function: bool) -> None:
    parts = {"compute_loss_func": lambda outputs, *_, **__: outputs["logits"].nothing_of_this_name}
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_this_name'"):
        gradients(
            ExactTrainer if of_function else exact(Mistaken),
            TOKENS.model(),
            TOKENS.rows(),
            parts=parts if of_function else None,
        )


class Weighted(Trainer):
    """A Trainer whose own `compute_loss` takes a mean over rows."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


def test_a_subclass_that_computes_its_own_loss_is_exact() -> None:
    assert below(window_errors(exact(Weighted), CLASSIFIER.model(), CLASSIFIER.rows(), size=4))
    assert max(window_errors(Weighted, CLASSIFIER.model(), CLASSIFIER.rows(), size=4)[0]) > FAR


def test_items_that_the_user_counts_weight_the_loss() -> None:
    """Class weights: the mean is over the weights of the labels."""
    weights = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)

    def weighted(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:  # noqa: ARG001
        return nn.functional.cross_entropy(outputs["logits"], labels, weight=weights)

    counted = exact(count_items=lambda batch: float(weights[batch["labels"]].sum()))(Trainer)
    given = {"parts": {"compute_loss_func": weighted}, "size": 4}
    assert below(same_as_one_batch(counted, Trainer, CLASSIFIER.model, CLASSIFIER.rows(), **given))


# ---- Windows without items -------------------------------------------------------------------------------------------


def ignored(row: Row) -> Row:
    return {**row, "labels": [IGNORED] * len(row["labels"])}


def test_a_micro_batch_without_loss_items_changes_nothing() -> None:
    rows = TOKENS.rows(10)
    rows[2:4] = map(ignored, rows[2:4])  # the second micro-batch
    rows[4:6] = map(ignored, rows[4:6])  # the first one of the second window
    rows[8:] = [rows[8], ignored(rows[9])]
    assert below(window_errors(ExactTrainer, TOKENS.model(), rows, size=4))


def test_a_window_without_loss_items_changes_nothing_and_has_no_loss() -> None:
    rows = TOKENS.rows(10)
    rows[4:8] = map(ignored, rows[4:8])
    model = TOKENS.model()
    found, logged = gradients(ExactTrainer, model, rows)
    assert found[1] == {}, "an optimizer with momentum would change the weights"
    assert logged[1] == 0
    others = [found[0], found[2]], [logged[0], logged[2]]
    assert below(errors_of(*others, model, [rows[:4], rows[8:]]))


# ---- Models ----------------------------------------------------------------------------------------------------------


def adapted() -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["query", "value"], r=2, lora_dropout=0.0, init_lora_weights=False)
    return get_peft_model(CLASSIFIER.model(), config).double()


def test_a_model_with_lora_is_exact() -> None:
    assert below(window_errors(ExactTrainer, adapted(), CLASSIFIER.rows(), size=4))


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=SLOW)])
def test_activation_checkpointing_is_exact(reentrant: bool) -> None:
    given = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad", UserWarning)  # while measuring
        assert below(window_errors(ExactTrainer, CLASSIFIER.model(), CLASSIFIER.rows(), size=4, **given))


def of_one_length(rows: list[Row], length: int = 5) -> list[Row]:
    return [{"input_ids": (row["input_ids"] * length)[:length], "labels": row["labels"]} for row in rows]


@pytest.mark.slow
def test_neftune_adds_its_noise_and_windows_stay_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same noise for every row, so that one batch has the same."""
    monkeypatch.setattr(
        Tensor, "uniform_", lambda noise, low, high, **_: noise.copy_(torch.linspace(low, high, noise.shape[-1]))
    )
    rows, given = of_one_length(CLASSIFIER.rows()), {"neftune_noise_alpha": 50.0}
    assert below(same_as_one_batch(ExactTrainer, Trainer, CLASSIFIER.model, rows, size=4, **given))
    without, _ = window_errors(ExactTrainer, CLASSIFIER.model(), rows, size=4, **given)
    assert max(without) > 0.01, "the noise was not added"


def test_neftune_with_random_noise_is_not_taken_for_an_inexact_loss() -> None:
    found, _ = gradients(ExactTrainer, CLASSIFIER.model(), CLASSIFIER.rows(), neftune_noise_alpha=5.0)
    assert len(found) == 3


# ---- The rest of Trainer ---------------------------------------------------------------------------------------------


def trainer_of(trainer_class: Any, model: nn.Module, folder: Path, rows: Any = None, **given: Any) -> Any:
    """Return a trainer with Trainer's own optimizer, in random order."""
    parts = {name: given.pop(name) for name in ("callbacks", "eval_dataset", "model_init") if name in given}
    usual = {"train_sampling_strategy": "random", "learning_rate": 1e-2, "max_grad_norm": 1.0}
    return trainer_class(
        model=None if "model_init" in parts else model, args=arguments(str(folder), **usual | given),
        train_dataset=Listed(CLASSIFIER.rows(10) if rows is None else rows), data_collator=one_batch, **parts,
    )  # fmt: skip


def weights_of(trainer: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def trained(trainer_class: Any, folder: Path, **given: Any) -> dict[str, Tensor]:
    set_seed(0)
    trainer = trainer_of(trainer_class, dropout_model(), folder, **given)
    trainer.train()
    return weights_of(trainer)


def test_measuring_leaves_dropout_and_the_order_of_rows_as_they_are(tmp_path: Path) -> None:
    """With one micro-batch per update, the weights are those of an unchanged Trainer."""
    given = {"gradient_accumulation_steps": 1}
    ours, theirs = (trained(trainer_class, tmp_path, **given) for trainer_class in (ExactTrainer, Trainer))
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6) for name in theirs)


class StoppedError(Exception):
    """An interruption."""


class StopAt(TrainerCallback):
    def __init__(self, update: int) -> None:
        self.update = update

    def on_substep_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step == self.update:
            raise StoppedError


@pytest.mark.parametrize(
    ("strategy", "planner"),
    [
        ("random", False),
        pytest.param("batch_rebalance", False, marks=SLOW),
        pytest.param("group_by_length", False, marks=SLOW),
        pytest.param("random", True, marks=SLOW),
    ],
)
def test_a_run_that_resumes_in_mid_epoch_has_the_same_weights_bit_for_bit(
    tmp_path: Path, strategy: str, planner: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(globals(), "Listed", list)  # the planner knows the lengths of a list
    rows, trainer_class = CLASSIFIER.rows(14), exact(planner=planner)(Trainer)
    given: dict[str, Any] = {"num_train_epochs": 2, "train_sampling_strategy": strategy, "rows": rows}
    given |= {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine"}
    whole = trained(trainer_class, tmp_path / "whole", **given)
    with pytest.raises(StoppedError):
        trained(trainer_class, tmp_path / "cut", callbacks=[StopAt(6)], **given)  # in the second epoch of 4 updates
    set_seed(1)
    trainer = trainer_of(trainer_class, dropout_model(), tmp_path / "cut", **given)
    trainer.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-6"))
    assert trainer.state.global_step == 8
    assert equal(weights_of(trainer), whole)
    assert "has no effect" not in capsys.readouterr().err


class Events(TrainerCallback):
    """Records the names of the events, and the state at each."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, float | None]] = []


def _record(name: str) -> Any:
    def on(self: Events, _: Any, state: Any, *__: Any, **___: Any) -> None:
        self.seen.append((name, state.global_step, state.epoch))

    return on


for _name in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
    setattr(Events, _name, _record(_name))


def test_callbacks_evaluation_and_the_log_are_those_of_an_unchanged_trainer(tmp_path: Path) -> None:
    seen, logs = [], []
    for trainer_class in (ExactTrainer, Trainer):
        events = Events()
        given: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
        given |= {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
        given |= {"include_num_input_tokens_seen": "all", "eval_dataset": Listed(CLASSIFIER.rows(5, seed=1))}
        folder = tmp_path / str(len(seen))
        trainer = trainer_of(trainer_class, CLASSIFIER.model(), folder, callbacks=[events], **given)
        trainer.train()
        seen.append(events.seen)
        logs.append(trainer.state.log_history)
        assert (folder / "checkpoint-2" / "model.safetensors").exists()
    assert seen[0] == seen[1]
    assert [entry.keys() for entry in logs[0]] == [entry.keys() for entry in logs[1]]
    tokens = [[entry["num_input_tokens_seen"] for entry in log if "num_input_tokens_seen" in entry] for log in logs]
    assert tokens[0] == tokens[1]
    assert logs[0][0]["eval_loss"] == pytest.approx(logs[1][0]["eval_loss"], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "smoothing"),
    [("causal LM, GPT-2", 0.1), pytest.param("causal LM, GPT-2", 0.0, marks=SLOW), ("token classification, BERT", 0.0)],
)
def test_evaluation_has_the_loss_of_an_unchanged_trainer(tmp_path: Path, name: str, smoothing: float) -> None:
    head, found = HEADS[name], []
    for trainer_class in (ExactTrainer, Trainer):
        trainer = trainer_of(
            trainer_class, head.model(), tmp_path, rows=head.rows(), eval_dataset=Listed(head.rows(5, seed=1)),
            label_smoothing_factor=smoothing, learning_rate=0.0,
        )  # fmt: skip
        before, predicted = trainer.evaluate(), trainer.predict(Listed(head.rows(4, seed=2)))
        trainer.train()
        found.append([before["eval_loss"], trainer.evaluate()["eval_loss"], predicted.metrics["test_loss"]])
    assert found[0] == pytest.approx(found[1], rel=1e-12)


class OverRowsFirst:
    """A loss that is a mean over rows, of means over their labels, and from then on a mean over labels."""

    def __init__(self) -> None:
        self.over_rows = True

    def of(self, logits: Tensor, labels: Tensor) -> Tensor:
        counts = labels.ne(IGNORED)
        losses = nn.functional.cross_entropy(logits.mT, labels, reduction="none")
        return (losses.sum(-1) / counts.sum(-1)).mean() if self.over_rows else losses.sum() / counts.sum()

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:  # noqa: ARG002
        return self.of(outputs["logits"], labels)

    def reference(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return self.of(model(**batch).logits, batch["labels"])


@pytest.mark.slow
def test_a_trainer_that_is_trained_again_measures_its_new_rows(tmp_path: Path) -> None:
    model, loss = TOKENS.model(), OverRowsFirst()
    optimizer = RecordingOptimizer(model)
    trainer = ExactTrainer(
        model=model, args=arguments(str(tmp_path)), train_dataset=[], data_collator=one_batch,
        optimizers=(optimizer, LambdaLR(optimizer, lambda _: 1.0)), compute_loss_func=loss,
    )  # fmt: skip
    for over_rows, rows in ((True, TOKENS.rows(6)), (False, TOKENS.rows(7, seed=3))):
        loss.over_rows, trainer.train_dataset = over_rows, Listed(rows)
        optimizer.gradients.clear()
        trainer.train()
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert below(errors_of(optimizer.gradients, logged, model, [rows[:4], rows[4:]], loss.reference))


class Once:
    """Has the second training pass with more than `most` rows run out of memory."""

    def __init__(self, model: nn.Module, most: int) -> None:
        self.most, self.begun, self.sizes = most, 0, list[int]()
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
        frames = {frame.function for frame in inspect.stack(0)}
        if "training_step" not in frames or not model.training:
            return
        self.sizes.append(len(kwargs["input_ids"]))
        self.begun += len(kwargs["input_ids"]) > self.most
        if len(kwargs["input_ids"]) > self.most and self.begun % 2 == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.slow
def test_a_batch_size_that_was_found_after_running_out_of_memory_is_exact() -> None:
    """Each attempt leaves the gradient of a first micro-batch behind."""
    model, rows = CLASSIFIER.model(), CLASSIFIER.rows(11)
    memory = Once(model, most=2)
    given = {"auto_find_batch_size": True, "per_device_train_batch_size": 4}
    found, logged = gradients(ExactTrainer, model, rows, **given)
    assert memory.sizes == [4, 4, 3, 3, 2, 2, 2, 2, 2, 1]
    assert below(errors_of(found, logged, model, [rows[:4], rows[4:8], rows[8:]]))


@pytest.mark.slow
def test_models_from_model_init_are_measured_for_each_run(tmp_path: Path) -> None:
    """The second one has a batch norm."""
    mixing = CLASSIFIER.model()
    mixing.classifier = nn.Sequential(nn.BatchNorm1d(16), mixing.classifier).double()
    models = [CLASSIFIER.model(), CLASSIFIER.model(), mixing]  # the first for the constructor
    trainer = trainer_of(exact(audit=False)(Trainer), mixing, tmp_path, model_init=lambda: models.pop(0))
    trainer.train()
    with pytest.warns(InexactLossWarning, match="BatchNorm1d"):
        trainer.train()
    assert trainer.model is mixing


@pytest.mark.slow
def test_a_search_over_hyperparameters_goes_on_working(tmp_path: Path) -> None:
    with contextlib.suppress(ImportError):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
    trainer = trainer_of(
        ExactTrainer, nn.Identity(), tmp_path, model_init=CLASSIFIER.model, eval_dataset=Listed(CLASSIFIER.rows(4)),
        eval_strategy="epoch",
    )  # fmt: skip
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)}, n_trials=2, backend="optuna"
    )
    assert 1e-4 <= best.hyperparameters["learning_rate"] <= 1e-2


# ---- The class -------------------------------------------------------------------------------------------------------


@exact
class Plain(Weighted):
    """A decorated class."""


@exact(audit=False, on_inexact="error")
class WithOptions(Weighted):
    """A class decorated with options."""

    def __init__(self, *args: Any, margin: float = 0.5, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.margin = margin


@pytest.mark.slow
@pytest.mark.parametrize("trainer_class", [Plain, WithOptions])
def test_a_decorated_class_is_exact(trainer_class: Any) -> None:
    assert below(window_errors(trainer_class, CLASSIFIER.model(), CLASSIFIER.rows(), size=4))


def test_a_decorated_class_keeps_its_name_docs_and_signature(tmp_path: Path) -> None:
    assert WithOptions.__name__ == WithOptions.__qualname__ == "WithOptions"
    assert WithOptions.__module__ == __name__
    assert WithOptions.__doc__ == "A class decorated with options."
    assert "margin" in inspect.signature(WithOptions).parameters
    assert inspect.signature(ExactTrainer) == inspect.signature(Trainer)
    assert ExactTrainer.__name__ == "Trainer"
    assert issubclass(WithOptions, Weighted)
    trainer: Any = trainer_of(WithOptions, CLASSIFIER.model(), tmp_path)
    assert isinstance(trainer, Trainer)
    assert trainer.margin == 0.5


class Below(Plain):
    """A subclass of an exact class, which overrides nothing that weighs the loss."""

    def log(self, logs: dict[str, float], *others: Any) -> None:
        super().log({**logs, "ours": 1.0}, *others)


def test_a_subclass_of_an_exact_class_is_exact() -> None:
    assert below(window_errors(Below, CLASSIFIER.model(), CLASSIFIER.rows(), size=4))


# ---- Two processes ---------------------------------------------------------------------------------------------------


def found_by(two_processes: Any, *arguments: str) -> dict[str, Any]:
    said = two_processes("trainers_of_two.py", *arguments)
    (line,) = [line for line in said.splitlines() if "FOUND " in line]  # maybe after a progress bar
    return json.loads(line.partition("FOUND ")[2])


@pytest.mark.slow
@pytest.mark.processes
def test_windows_of_two_processes_are_exact_and_the_rest_of_trainer_works(two_processes: Any) -> None:
    found = found_by(two_processes)
    assert {case: errors for case, (*errors, _) in found["exact"].items() if max(errors) > LOGGED} == {}
    assert {case: gradient for case, (gradient, *_) in found["exact"].items() if gradient > 1e-10} == {}
    for case, (*_, windows) in found["exact"].items():
        n_rows = int(case.split()[-2]) if case.endswith(" rows") else max(map(max, windows)) + 1
        counted = sorted(chain(*windows))
        assert counted == sorted([*range(n_rows)] * (len(counted) // n_rows)), case
    assert min(gradient for gradient, *_ in found["unchanged"].values()) > FAR
    assert max(found["dispatched"]) < 1e-10
    assert found["resumed"]
    for gradient, loss, windows, arrived in found["planned"].values():
        assert gradient < 1e-10
        assert loss < LOGGED
        assert windows == arrived
    rows_of_epochs = list(chain(*found["grouped with dropout"]))
    assert sorted(rows_of_epochs[:13]) == sorted(rows_of_epochs[13:]) == list(range(13))
    uneven, wrapped, apart = found["refusals"]
    assert "`dispatch_batches` is False and `train_dataset` is a stream" in apart.replace("accelerator_config.", "")
    assert "`accelerator_config.even_batches` is False" in uneven
    assert "`model` is wrapped in DistributedDataParallel" in wrapped


@pytest.mark.slow
@pytest.mark.processes
def test_every_head_is_exact_on_two_processes(two_processes: Any) -> None:
    found = found_by(two_processes, "heads")
    assert found.keys() == HEADS.keys()
    assert {name: error for name, error in found.items() if error > 1e-10} == {}
