"""Parameters that the optimizer holds besides those that the model trained from the start."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from transformers import TrainerCallback

from .case import case
from .rates import distance, regression, train

_CLIP = 0.5


class _Uncertain(nn.Module):
    """A squared error that is weighted by a learned uncertainty, in a loss module."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets) * torch.exp(-self.log_variance) + self.log_variance


@case(27, "a loss has a parameter, which the optimizer holds")
def parameter_of_the_loss() -> float:
    return _error_with_parameter(as_function=False)


@case(27, "a function as the loss reads a parameter, which the optimizer holds")
def parameter_of_no_module() -> float:
    return _error_with_parameter(as_function=True)


def _error_with_parameter(*, as_function: bool) -> float:
    """Return the error of a linear layer and of the uncertainty together."""
    (model, rows), loss = regression(), _Uncertain()
    trained = nn.ModuleList([model, loss])
    start, reference = copy.deepcopy(trained), copy.deepcopy(trained)
    _train_plainly(reference, rows, SGD(reference.parameters(), lr=0.1))
    optimizer = SGD(trained.parameters(), lr=0.1)
    loss_fn = (lambda outputs, targets: loss(outputs, targets)) if as_function else loss
    train(model, rows, optimizer, loss_fn=loss_fn, gradient_clip_norm=_CLIP)
    return distance(trained, reference, start)


class _Partly16(nn.Module):
    """Two linear layers in float64, and a weight in bf16 whose gradient is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4).double(), nn.Linear(4, 2).double()
        self.narrow = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(inputs).tanh()) + 0 * self.narrow


class _Changes(TrainerCallback):
    """Unfreezes the first layer, or adds it to the optimizer, before the second update."""

    def __init__(self, model: _Partly16, optimizer: Optimizer, *, adds: bool) -> None:
        self._model, self._optimizer, self._adds = model, optimizer, adds

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if state.global_step == 1:
            self.change()

    def change(self) -> None:
        self._model.first.requires_grad_(True)
        if self._adds:
            self._optimizer.add_param_group({"params": list(self._model.first.parameters())})


@case(27, "a weight that is unfrozen, with gradients summed in float32 and clipped")
def unfrozen_weight() -> float:
    return _error_of_change(adds=False)


@case(27, "a weight that is added to the optimizer, with gradients summed in float32 and clipped")
def added_weight() -> float:
    return _error_of_change(adds=True)


def _error_of_change(*, adds: bool) -> float:
    rows = regression()[1]
    torch.manual_seed(0)
    start = _Partly16()
    start.first.requires_grad_(adds)
    reference, model = copy.deepcopy(start), copy.deepcopy(start)
    changes = [_Changes(each, SGD(_held(each, adds=adds), lr=0.5), adds=adds) for each in (reference, model)]
    _train_plainly(reference, rows, changes[0]._optimizer, changes[0])
    train(model, rows, changes[1]._optimizer, callbacks=[changes[1]], accumulate_in_fp32=True, gradient_clip_norm=_CLIP)
    return distance(model, reference, start)


def _held(model: _Partly16, *, adds: bool) -> list[nn.Parameter]:
    """Return the parameters that the optimizer holds from the start."""
    return [p for name, p in model.named_parameters() if not (adds and name.startswith("first"))]


def _train_plainly(model: Any, rows: Any, optimizer: Optimizer, changes: _Changes | None = None) -> None:
    """Make three updates in plain PyTorch, with clipped gradients."""
    inputs, targets = (torch.stack(column) for column in zip(*rows, strict=True))
    for update in range(3):
        if changes is not None and update == 1:
            changes.change()
        optimizer.zero_grad()
        if isinstance(model, nn.ModuleList):
            loss = model[1](model[0](inputs), targets)
        else:
            loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], _CLIP)
        optimizer.step()
