"""Losses that change during the run: their items are counted anew, or an audit finds that they no longer are."""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from exactness import windows_of
from ftaccum import DataError, ExactAccumulation, InexactLossError, InexactLossWarning, exact, test_fine_tuning
from ftaccum.planning.audit_schedule import AuditSchedule, AuditSize
from ftaccum.runtime.watched_state import WatchedState
from heads import PAD, VOCABULARY, all_in_float64, relative_error

SIZES = {"batch_size": 2, "effective_batch_size": 5}
WEIGHTS = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)
AT = 3  # the updates made before the change
Change = Callable[[], Any]


def draw(n: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (n,), generator=generator)
    return [{"x": torch.randn(6, generator=generator, dtype=torch.float64), "labels": label} for label in labels]


ROWS = draw(40)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Criterion(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.cross_entropy = nn.CrossEntropyLoss(**options)

    def forward(self, outputs: Tensor, batch: Any) -> Tensor:
        return self.cross_entropy(outputs, batch["labels"])


class Recorder(TrainerCallback):
    """Changes the loss before update `AT`, and compares each gradient with that of one batch in plain PyTorch."""

    def __init__(self, loss_fn: Any, change: Change, windows: Sequence[Any]) -> None:
        self.errors: list[float] = []
        self._loss_fn, self._change, self._windows = loss_fn, change, windows

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:  # noqa: ARG002
        if state.global_step == AT:
            self._change()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **others: Any) -> None:  # noqa: ARG002
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        one = copy.deepcopy(model)
        one.zero_grad()
        rows = self._windows[state.global_step]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        self._loss_fn(one(batch["x"]), batch).backward()
        self.errors.append(relative_error(found, {name: p.grad for name, p in one.named_parameters()}))


def errors_of(loss_fn: Any, change: Change, rows: Sequence[Any] = ROWS, **options: Any) -> list[float]:
    recorder = Recorder(loss_fn, change, windows_of(rows, **SIZES))
    test_fine_tuning(
        Net(), train_data=list(rows), loss_fn=loss_fn, validation_split=0.0, n_epochs=1, gradient_clip_norm=None,
        progress=False, callbacks=[recorder], **SIZES, **options,
    )  # fmt: skip
    return recorder.errors


@pytest.mark.parametrize("first", [None, torch.ones(3).double(), torch.tensor([1.0, 2.0, 3.0]).double()])
def test_class_weights_that_a_callback_replaces_are_counted(first: Tensor | None) -> None:
    criterion = Criterion(weight=first)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InexactLossWarning)
        errors = errors_of(criterion, lambda: setattr(criterion.cross_entropy, "weight", WEIGHTS))
    assert len(errors) == 8
    assert max(errors) < 1e-12


def test_class_weights_that_a_callback_changes_in_place_are_counted_in_the_window_read_ahead() -> None:
    criterion = Criterion(weight=torch.ones(3).double())
    assert max(errors_of(criterion, lambda: criterion.cross_entropy.weight.copy_(WEIGHTS), audit=False)) < 1e-12


def test_rows_that_are_no_longer_ignored_are_counted() -> None:
    rows = [row | {"labels": torch.tensor(0)} if n % 3 else row for n, row in enumerate(ROWS)]
    criterion = Criterion(ignore_index=0)  # some micro-batches have no items until the change
    errors = errors_of(criterion, lambda: setattr(criterion.cross_entropy, "ignore_index", 1), rows)
    assert max(errors) < 1e-12


def test_a_changed_value_of_a_closure_is_audited_before_its_update() -> None:
    weight: dict[str, Tensor | None] = {"w": None}
    loss_fn = lambda outputs, batch: F.cross_entropy(outputs, batch["labels"], weight=weight["w"])
    with pytest.warns(InexactLossWarning, match=f"Audit of update {AT + 1}.*`weight\\['w'\\]`"):
        errors_of(loss_fn, lambda: weight.update(w=WEIGHTS))
    weight["w"] = None
    recorder = Recorder(loss_fn, lambda: weight.update(w=WEIGHTS), windows_of(ROWS, **SIZES))
    with pytest.raises(InexactLossError, match=f"Audit of update {AT + 1}"):
        test_fine_tuning(
            Net(), train_data=ROWS, loss_fn=loss_fn, validation_split=0.0, n_epochs=1, gradient_clip_norm=None,
            progress=False, callbacks=[recorder], on_inexact="error", **SIZES,
        )  # fmt: skip
    assert len(recorder.errors) == AT


def test_a_term_that_grows_from_zero_is_audited() -> None:
    class Annealed(nn.Module):
        beta = 0.0

        def forward(self, outputs: Tensor, batch: Any) -> Tensor:
            kept = batch["labels"] > 0
            penalty = (outputs[kept] ** 2).sum() / kept.sum().clamp(min=1)
            return F.cross_entropy(outputs, batch["labels"]) + self.beta * penalty

    loss_fn = Annealed()
    loss_fn.beta = 0.0
    with pytest.warns(InexactLossWarning, match=f"Audit of update {AT + 1}.*`loss_fn.beta`"):
        errors_of(loss_fn, lambda: setattr(loss_fn, "beta", 1.0))


def test_a_reduction_that_changes_is_audited_with_audits_at_fixed_updates_too() -> None:
    criterion = Criterion()
    with pytest.warns(InexactLossWarning, match=f"Audit of update {AT + 1}"):
        errors_of(criterion, lambda: setattr(criterion.cross_entropy, "reduction", "sum"), audit=7)


class At(TrainerCallback):
    def __init__(self, change: Callable[[Any], Any]) -> None:
        self._change = change

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **others: Any) -> None:  # noqa: ARG002
        if state.global_step == AT:
            self._change(model)


CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 16,
    "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}  # fmt: skip


def train_texts(model: nn.Module, change: Callable[[Any], Any], n_tokens: int) -> None:
    ids = torch.randint(3, VOCABULARY, (25, n_tokens), generator=torch.Generator().manual_seed(0)).tolist()
    test_fine_tuning(
        model, train_data=[{"input_ids": each, "labels": each} for each in ids], validation_split=0.0, n_epochs=1,
        progress=False, callbacks=[At(change)], **SIZES,
    )  # fmt: skip


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="in 64 bits, chunks need torch 2.13")
def test_a_setting_that_logits_in_chunks_do_not_read_is_audited() -> None:
    with all_in_float64():
        model = Gemma2ForCausalLM(Gemma2Config(**CONFIG, head_dim=8, final_logit_softcapping=None)).double()
        with pytest.warns(InexactLossWarning, match=f"Audit of update {AT + 1}.*final_logit_softcapping"):
            train_texts(model, lambda model: setattr(model.config, "final_logit_softcapping", 0.5), 190)


def test_a_router_that_is_switched_off_during_the_run_is_named() -> None:
    config = MixtralConfig(**CONFIG, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5)
    with pytest.raises(DataError, match="no longer returns `aux_loss`"):
        train_texts(MixtralForCausalLM(config), lambda model: setattr(model.config, "output_router_logits", False), 8)


def loop_errors(loss_fn: Any, change: Change) -> list[float]:
    """Return the gradient errors of a loop with ExactAccumulation."""
    model, errors = Net(), []
    accumulation = ExactAccumulation(model, loss_fn=loss_fn)
    batches = [(torch.stack([row["x"]] * 1), row["labels"].reshape(1)) for row in ROWS]
    for n, window in enumerate(accumulation.windows(batches, 5)):
        if n == AT:
            change()
        model.zero_grad()
        accumulation.backward(window)
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        inputs, labels = map(torch.cat, zip(*window, strict=True))
        loss_fn(model(inputs), labels).backward()
        errors.append(relative_error(found, {name: p.grad for name, p in model.named_parameters()}))
    return errors


def test_loops_of_the_user_count_changed_weights_and_ignored_labels() -> None:
    weighted, ignoring = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
    assert max(loop_errors(weighted, lambda: setattr(weighted, "weight", WEIGHTS))) < 1e-12
    assert max(loop_errors(ignoring, lambda: setattr(ignoring, "ignore_index", 1))) < 1e-12


def test_loops_of_the_user_audit_other_changes() -> None:
    loss_fn = nn.CrossEntropyLoss()
    with pytest.warns(InexactLossWarning, match=f"Audit of update {AT + 1}"):
        loop_errors(loss_fn, lambda: setattr(loss_fn, "reduction", "sum"))


@pytest.mark.skipif(not hasattr(Trainer, "loss_is_scaled_for_ga"), reason="`exact` needs Transformers 5.19")
def test_an_attribute_that_compute_loss_reads_is_audited_when_it_changes(tmp_path: Any) -> None:
    class Weighted(Trainer):
        weight: Tensor | None = None

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            outputs = model(inputs["x"])
            loss = F.cross_entropy(outputs, inputs["labels"], weight=self.weight)
            return (loss, outputs) if return_outputs else loss

    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=3, num_train_epochs=1, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    collate = lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    trainer = exact(Weighted)(Net(), arguments, train_dataset=ROWS, data_collator=collate)
    trainer.weight = None
    trainer.add_callback(At(lambda _: setattr(trainer, "weight", WEIGHTS)))
    with pytest.warns(InexactLossWarning, match="Audit of update 5"):  # the window before the change is counted by then
        trainer.train()


def watched(loss_fn: Any, change: Change, model: nn.Module | None = None) -> list[str]:
    state = WatchedState(model or Net(), lambda: {"loss_fn": loss_fn})
    assert not state.look()
    change()
    state.look()
    return state.places


BETA = {"value": 1.0}


class Settings:
    def __init__(self) -> None:
        self.margins = [1.0, 2.0]


def test_state_is_watched_wherever_a_loss_keeps_it() -> None:
    settings, criterion, default = Settings(), Criterion(weight=torch.ones(3)), torch.zeros(2)

    def loss_fn(outputs: Tensor, batch: Any, *, scale: Tensor = default) -> Tensor:
        return criterion(outputs, batch) * scale.sum() * BETA["value"] + settings.margins[0]

    assert watched(loss_fn, lambda: default.add_(1)) == ["scale"]
    assert watched(loss_fn, lambda: settings.margins.append(3.0)) == ["settings.margins"]
    assert watched(loss_fn, lambda: BETA.update(value=2.0)) == ["BETA['value']"]
    assert watched(loss_fn, lambda: setattr(criterion, "cross_entropy", nn.NLLLoss())) == ["criterion.cross_entropy"]
    assert watched(settings, lambda: setattr(settings, "margins", [2.0])) == ["loss_fn.margins"]
    model = Net()
    assert watched(None, lambda: setattr(model.layers[0], "scale", 2.0), model) == ["model.layers.0.scale"]
    assert watched(None, lambda: model.eval(), model) == []
    layer = model.layers[2].requires_grad_(False)
    assert watched(None, lambda: layer.bias.data.add_(1), model) == ["model.layers.2.bias"]
    model.register_buffer("share", torch.zeros(()))
    assert watched(None, lambda: model.share.add_(1), model) == ["model.share"]
    assert watched(None, lambda: setattr(model, "share", torch.ones(()) * 3), model) == ["model.share"]
    assert watched(None, lambda: layer.requires_grad_(True).bias.data.add_(1), model) == []
    same = lambda module, inputs, outputs: outputs  # noqa: ARG005
    assert watched(None, lambda: layer.register_forward_hook(same), model) == ["the hooks of model.layers.2"]
    clamp = lambda gradient: gradient.clamp(-1, 1)
    assert watched(None, lambda: layer.weight.register_hook(clamp), model) == ["the hooks of model.layers.2.weight"]
    normed = nn.Sequential(nn.BatchNorm1d(2))
    assert watched(None, lambda: normed(torch.randn(4, 2)), normed) == []
    assert watched(criterion, lambda: torch.nn.init.zeros_(model.layers[0].weight), model) == []


def test_a_place_that_changes_all_the_time_is_no_news() -> None:
    counter, criterion = {"n": 0}, Criterion(weight=torch.ones(3))

    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        return criterion(outputs, batch) * counter["n"]

    state = WatchedState(Net(), lambda: {"loss_fn": loss_fn})
    news = []
    for n in range(8):
        counter["n"] += 1
        if n == 6:
            criterion.cross_entropy.weight.mul_(2)
        assert state.look()
        news.append(state.is_rare_change)
        state.audited()
    assert news == [True, True, True, False, False, False, True, True]


def test_updates_with_a_changed_loss_are_audited_at_any_cost_a_few_times() -> None:
    schedule = AuditSchedule(True, 800, spent=50.0, trained=1.0)
    assert schedule.size(500, is_new=True) is AuditSize.FEW_ROWS
    taken = 0
    while schedule.may_take(is_new=False, is_changed=True, is_rare_change=True):
        schedule.done(1.0, is_planned=False, is_rare_change=True)
        taken += 1
    assert (taken, schedule.extra) == (8, 8)
    assert not AuditSchedule(False, 800).may_take(is_new=False, is_changed=True, is_rare_change=True)
    assert AuditSchedule(3, 800).may_take(is_new=False, is_changed=True, is_rare_change=True)
    assert not AuditSchedule(True, 800, spent=1.0, trained=1.0).may_take(is_new=False, is_changed=True)
    later = AuditSchedule(True, 4000, spent=0.8, trained=100.0, changes=0)
    later._ahead = []
    assert later.may_take(is_new=False, is_changed=True)
    assert not later.may_take(is_new=False)


def test_a_loss_that_counts_its_calls_does_not_add_audits_for_ever() -> None:
    class Counting(Criterion):
        calls = 0

        def forward(self, outputs: Tensor, batch: Any) -> Tensor:
            self.calls += 1
            return super().forward(outputs, batch)

    result = test_fine_tuning(
        Net(), train_data=draw(200), loss_fn=Counting(), validation_split=0.0, n_epochs=1, progress=False,
        batch_size=2, effective_batch_size=5,
    )  # fmt: skip
    assert len([each for each in result.audits if each["audit"] > 1]) <= 4  # three, and the one in the middle
