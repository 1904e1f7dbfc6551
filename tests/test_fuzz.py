"""Any run at all: one clear error before training, or every update exact."""

import contextlib
import inspect
import io
import math
import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import event, given
from torch import nn

from cases import KINDS, Case, cases, rates, refused, split, windows
from ftaccum import DataError, Result, SettingsError, test_fine_tuning
from fuzzing import fuzz
from heads import RecordingOptimizer, all_in_float64, relative_error

_ARGUMENTS = inspect.signature(test_fine_tuning).parameters.keys()


@pytest.mark.slow
@fuzz(examples=80)
@given(case=cases())
def test_any_run_is_refused_before_training_or_exact(case: Case) -> None:
    model = case.model()
    optimizer = RecordingOptimizer(model)  # leaves the weights where they are
    before = _state(model)
    result, told = None, None
    try:
        with all_in_float64(), contextlib.redirect_stdout(io.StringIO()):
            result = test_fine_tuning(
                model,
                train_data=case.data(),
                val_data=case.validation_data(),
                optimizer=optimizer,
                progress=False,
                **case.loss(),
                **case.arguments,
            )
    except (SettingsError, DataError) as error:
        told = str(error)
    event("trained" if told is None else "refused")
    assert refused(case) == (told is not None), told
    if result is None:
        assert set(re.findall("`(\\w+)`", told)) & _ARGUMENTS, told
        assert not optimizer.gradients
    else:
        with all_in_float64():
            _assert_exact(case, result, optimizer, case.model())
    assert _state(model) == before


def _assert_exact(case: Case, result: Result, optimizer: RecordingOptimizer, model: nn.Module) -> None:
    kind = KINDS[case.kind]
    wanted = windows(case)
    items = [sum(map(kind.items, rows)) for _, rows in wanted]
    losses, gradients, norms = [], [], []
    for (_, rows), n in zip(wanted, items, strict=True):
        model.zero_grad()
        loss = kind.loss(model, rows) if n else torch.tensor(math.nan)
        if n:
            loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        losses.append(loss.item())
        gradients.append(found)
        norms.append(math.sqrt(sum(float((g**2).sum()) for g in found.values())))
    assert result.optimizer_steps == sum(map(bool, items)) == len(optimizer.gradients)
    assert result.skipped_steps == items.count(0)
    assert result.loss_history == pytest.approx(losses, rel=1e-9, nan_ok=True)
    assert result.grad_norm_history == pytest.approx(norms, rel=1e-9)
    assert result.lr_history == pytest.approx(list(rates(case, [n > 0 for n in items])), abs=1e-12)
    taken = [(gradient, norm) for gradient, norm, n in zip(gradients, norms, items, strict=True) if n]
    for got, (gradient, norm) in zip(optimizer.gradients, taken, strict=True):
        clipped = min(1.0, (case.gradient_clip_norm or math.inf) / (norm + 1e-6))
        assert relative_error(got, {name: clipped * g for name, g in gradient.items()}) < 1e-9
    n_epochs = wanted[-1][0] + 1
    assert result.train_loss_history == pytest.approx(
        [_mean([(loss, n) for (at, _), loss, n in zip(wanted, losses, items, strict=True) if at == epoch])
         for epoch in range(n_epochs)], rel=1e-9, nan_ok=True,
    )  # fmt: skip
    _, val = split(case)
    counted = [row for row in val if kind.items(row)]
    val_loss = kind.loss(model.eval(), counted).item() if counted else math.nan
    n_evaluations = len({epoch for epoch, _ in wanted}) * bool(val)  # one after each epoch that has an update
    assert result.val_loss_history == pytest.approx([val_loss] * n_evaluations, rel=1e-9, nan_ok=True)


def _mean(losses: Sequence[tuple[float, int]]) -> float:
    n = sum(n for _, n in losses)
    return sum(loss * n for loss, n in losses if n) / n if n else math.nan


def _state(model: nn.Module) -> list[Any]:
    """Return the state that a run must restore, as lists. The optimizer of this test does not change the weights."""
    weights = [tensor.tolist() for tensor in model.state_dict().values()]
    _, keys, *place = np.random.get_state()
    return [torch.get_rng_state().tolist(), keys.tolist(), place, random.getstate(), model.training, weights]
