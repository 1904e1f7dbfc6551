"""Models and optimizers that a callback changes during the run."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from exactness import windows_of
from ftaccum import test_fine_tuning
from heads import HEADS, VOCABULARY, all_in_float64, one_batch, relative_error

BERT = HEADS["sequence classification, BERT"]
SIZES = {"batch_size": 2, "effective_batch_size": 5}
AT = 2  # the updates made before the change


class Recorder(TrainerCallback):
    """Changes the model before update `AT`, and compares each gradient with that of one batch in plain PyTorch."""

    def __init__(self, change: Callable[[Any, Any], Any], windows: Sequence[Any]) -> None:
        self.errors: list[float] = []
        self._change, self._windows = change, windows

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:  # noqa: ARG002
        if state.global_step == AT:
            self._change(others["model"], others["optimizer"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **others: Any) -> None:  # noqa: ARG002
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        one = copy.deepcopy(model)  # with the hooks of modules, but not those of tensors
        one.zero_grad()
        one(**one_batch(self._windows[state.global_step])).loss.backward()
        wanted = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
        if getattr(model, "is_hooked", False):
            wanted[TABLE][:20] = 0
        assert found.keys() == wanted.keys()
        self.errors.append(relative_error(found, wanted))


TABLE = "bert.embeddings.word_embeddings.weight"


def errors_of(
    change: Callable[[Any, Any], Any], prepare: Callable[[Any], Any] | None = None, **options: Any
) -> list[float]:
    with all_in_float64():
        model, rows = BERT.model(), BERT.rows(25)
        if prepare is not None:
            prepare(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        recorder = Recorder(change, windows_of(rows, **SIZES))
        test_fine_tuning(
            model, train_data=rows, optimizer=optimizer, validation_split=0.0, n_epochs=1, gradient_clip_norm=None,
            progress=False, audit=False, callbacks=[recorder], **SIZES, **options,
        )  # fmt: skip
    return recorder.errors


def without_first_rows(gradient: Tensor) -> Tensor:
    return torch.where(torch.arange(VOCABULARY)[:, None] < 20, torch.zeros_like(gradient), gradient)


def clear_first_rows(weight: nn.Parameter) -> None:
    assert weight.grad is not None
    weight.grad[:20] = 0


@pytest.mark.parametrize("is_late", [False, True], ids=["in the gradient", "after accumulation"])
def test_hooks_on_an_embedding_that_a_callback_registers_get_dense_gradients(is_late: bool) -> None:
    def hook(model: Any, optimizer: Any) -> None:  # noqa: ARG001
        weight = model.get_input_embeddings().weight
        if is_late:
            weight.register_post_accumulate_grad_hook(clear_first_rows)
        else:
            weight.register_hook(without_first_rows)
        model.is_hooked = True

    errors = errors_of(hook)
    assert len(errors) == 5
    assert max(errors) < 1e-12


class Rates(TrainerCallback):
    """Records the rates of all groups before each step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **others: Any) -> None:  # noqa: ARG002
        self.rates = [*getattr(self, "rates", []), [group["lr"] for group in optimizer.param_groups]]


def test_groups_that_a_callback_adds_are_trained_and_scheduled() -> None:
    added: list[Any] = []

    def freeze(model: Any) -> None:
        model.bert.requires_grad_(False)

    def unfreeze(model: Any, optimizer: Any) -> None:
        parameters = [*model.bert.encoder.layer[-1].parameters()]
        for p in parameters:
            p.requires_grad_(True)
        optimizer.add_param_group({"params": parameters, "lr": 0.01})
        added.append((optimizer, parameters[0], parameters[0].detach().clone()))

    errors = errors_of(unfreeze, freeze, lr_scheduler="linear", warmup_steps=0)
    assert len(errors) == 5
    assert max(errors) < 1e-12
    ((optimizer, parameter, before),) = added
    assert not torch.equal(parameter, before)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.01]  # as they were given


def test_weights_that_are_unfrozen_before_they_are_trained_keep_no_gradient() -> None:
    errors = errors_of(
        lambda model, _: model.requires_grad_(True), lambda model: model.bert.requires_grad_(False), on_inexact="warn"
    )
    assert max(errors) < 1e-12


def test_a_new_group_follows_the_schedule() -> None:
    model = nn.Linear(3, 2)
    more, rates = nn.Linear(1, 1), Rates()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = [(torch.ones(3), torch.tensor(n % 2)) for n in range(20)]

    class Add(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:  # noqa: ARG002
            if state.global_step == AT:
                optimizer.add_param_group({"params": [*more.parameters()], "lr": 1.0})

    test_fine_tuning(
        model, train_data=rows, loss_fn=nn.CrossEntropyLoss(), optimizer=optimizer, validation_split=0.0, n_epochs=1,
        progress=False, callbacks=[Add(), rates], lr_scheduler="linear", warmup_steps=0, **SIZES,
    )  # fmt: skip
    assert rates.rates == [[0.1], [pytest.approx(0.075)], [pytest.approx(0.05), 0.5], [pytest.approx(0.025), 0.25]]
