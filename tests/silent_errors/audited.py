"""Gradients and counts that no measurement before training foresees: audits of real updates find them."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftaccum import test_fine_tuning

from .case import case, update_error

N_ROWS, N_FEATURES = 12, 6


def _rows(n_rows: int = N_ROWS) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(N_FEATURES, dtype=torch.float64), torch.tensor(n % 2)) for n in range(n_rows)]


def _inputs(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])


def _cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def _error_of(model: nn.Module) -> float:
    rows = _rows()
    inputs, targets = _inputs(rows)
    return update_error(
        model.double(), rows, lambda m: F.cross_entropy(m(inputs), targets), N_ROWS, loss_fn=_cross_entropy
    )


class _Penalize(torch.autograd.Function):
    """Adds 0.01 · sign(w) to the gradient of a weight, once a backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient + 0.01 * ctx.saved_tensors[0].sign()


class _Sparse(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, _Penalize.apply(self.weight), self.bias)


class _Normalize(torch.autograd.Function):
    """Scales a gradient to a norm of 1."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:  # noqa: ARG004
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return gradient / gradient.norm()


class _Apply(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function.apply(inputs)


@case(
    9,
    "a penalty that an autograd function adds to the gradient",
    refused="gradient of rows apart",
)
def added_gradient() -> float:
    torch.manual_seed(1)
    return _error_of(_Sparse(N_FEATURES, 2))


@case(9, "a layer that normalizes the gradient", refused="gradient of rows apart")
def normalized_gradient() -> float:
    torch.manual_seed(1)
    return _error_of(nn.Sequential(nn.Linear(N_FEATURES, 5), _Apply(_Normalize), nn.Linear(5, 2)))


@case(9, "a hook that clamps the gradient of a weight", refused="gradient of rows apart")
def clamped_gradient() -> float:
    torch.manual_seed(1)
    rows, model = _rows(), nn.Linear(N_FEATURES, 2).double()
    inputs, targets = _inputs(rows)

    def loss_of_all(reference: nn.Module) -> Tensor:
        reference.weight.register_hook(lambda gradient: gradient.clamp(-0.02, 0.02))
        return F.cross_entropy(reference(inputs), targets)

    model.weight.register_hook(lambda gradient: gradient.clamp(-0.02, 0.02))
    return update_error(model, rows, loss_of_all, N_ROWS, loss_fn=_cross_entropy)


@case(9, "an embedding with scale_grad_by_freq", refused="gradient of rows apart")
def gradient_scaled_by_frequency() -> float:
    torch.manual_seed(1)
    rows = [(torch.tensor([n % 3, 1, 0]), torch.tensor(n % 2)) for n in range(N_ROWS)]
    model = nn.Sequential(nn.Embedding(4, 4, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(12, 2)).double()
    inputs, targets = _inputs(rows)
    return update_error(model, rows, lambda m: F.cross_entropy(m(inputs), targets), N_ROWS, loss_fn=_cross_entropy)


def _over_hard(outputs: Any, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(outputs, targets, reduction="none")
    hard = losses > 0.02
    return (losses * hard).sum() / hard.sum().clamp(min=1)


@case(10, "a mean over losses above 0.02, which shrink", refused="the loss does not weight these rows by")
def count_that_changes() -> float:
    torch.manual_seed(1)
    rows = [(x, (x[0] > 0).long()) for x, _ in _rows()]
    model, (inputs, targets) = nn.Linear(N_FEATURES, 2).double(), _inputs(rows)
    reference, start = copy.deepcopy(model), copy.deepcopy(model)
    for _ in range(20):
        reference.zero_grad()
        _over_hard(reference(inputs), targets).backward()
        with torch.no_grad():
            for p in reference.parameters():
                p -= 2 * p.grad
    test_fine_tuning(
        model, train_data=rows, loss_fn=_over_hard, batch_size=2, effective_batch_size=N_ROWS, n_epochs=20,
        validation_split=0.0, optimizer=lambda groups: torch.optim.SGD(groups), learning_rate=2.0,
        lr_scheduler="constant", weight_decay=0.0, gradient_clip_norm=None, on_inexact="error", progress=False,
    )  # fmt: skip
    off = sum(
        float((a - b).detach().square().sum()) for a, b in zip(model.parameters(), reference.parameters(), strict=True)
    )
    moved = sum(
        float((a - b).detach().square().sum()) for a, b in zip(start.parameters(), reference.parameters(), strict=True)
    )
    return (off / moved) ** 0.5


class _Counting(nn.Module):
    """Its outputs grow with every training pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(N_FEATURES, 2), 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += self.training and torch.is_grad_enabled()
        return self.linear(inputs) * (1 + 0.1 * self.calls)


@case(12, "a counter in `forward` that changes its outputs", refused="state outside of the model's buffers")
def counter_in_forward() -> float:
    torch.manual_seed(1)
    return _error_of(_Counting())
