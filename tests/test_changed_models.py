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
