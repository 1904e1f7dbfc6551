"""Losses that are additive over rows, but whose gradients are not."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import case, update_error

N_ROWS, CLASSES = 8, 3


class _HiddenTerm(torch.autograd.Function):
    """The identity, whose backward pass adds the gradient of a penalty on the mean of the rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] + x.mean(0) * x.mean(0).square().sum() / len(x)


class _Normalized(torch.autograd.Function):
    """The identity, whose backward pass scales the gradient to norm 1."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] / gradients[0].norm()


class Net(nn.Module):
    def __init__(self, function: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer, self.function = nn.Linear(4, 6), nn.Linear(6, CLASSES), function
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner(x).tanh()
        return self.outer(inner if self.function is None else self.function.apply(inner))


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def error_of(model: nn.Module, loss: Any = loss_fn, **arguments: Any) -> float:
    draw = torch.Generator().manual_seed(3)
    rows = [(torch.randn(4, generator=draw).double(), torch.tensor(n % CLASSES)) for n in range(N_ROWS)]
    x, y = (torch.stack(column) for column in zip(*rows, strict=True))
    return update_error(model, rows, lambda model: loss_fn(model(x), y), N_ROWS, loss_fn=loss, **arguments)


@case(9, "a term that an autograd function adds to the gradient", refused="gradient over separate micro-batches")
def hidden_term() -> float:
    return error_of(Net(_HiddenTerm))


@case(9, "a layer that normalizes its gradient", refused="gradient over separate micro-batches")
def normalised_gradient() -> float:
    return error_of(Net(_Normalized))


@case(9, "a hook that clamps the gradient of a weight", refused="gradient over separate micro-batches")
def clamping_hook() -> float:
    model = Net()
    model.inner.weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    draw = torch.Generator().manual_seed(3)
    rows = [(torch.randn(4, generator=draw).double(), torch.tensor(n % CLASSES)) for n in range(N_ROWS)]
    x, y = (torch.stack(column) for column in zip(*rows, strict=True))

    def loss_of_all(copied: nn.Module) -> Tensor:
        copied.inner.weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
        return loss_fn(copied(x), y)

    return update_error(model, rows, loss_of_all, N_ROWS, loss_fn=loss_fn)


@case(9, "a hook that clamps a gradient after it was accumulated", refused="post_accumulate_grad_hook")
def clamping_hook_after_accumulation() -> float:
    def clamp(parameter: Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad.clamp_(-0.01, 0.01)

    model = Net()
    model.inner.weight.register_post_accumulate_grad_hook(clamp)
    return error_of(model)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.outer = nn.Embedding(7, 6, scale_grad_by_freq=True), nn.Linear(6, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.embed(x).tanh().mean(1))


@case(9, "`scale_grad_by_freq`", refused="gradient over separate micro-batches")
def scaled_by_frequency() -> float:
    draw = torch.Generator().manual_seed(3)
    rows = [(torch.randint(0, 7, (5,), generator=draw), torch.tensor(n % CLASSES)) for n in range(N_ROWS)]
    x, y = (torch.stack(column) for column in zip(*rows, strict=True))
    return update_error(Bag(), rows, lambda model: loss_fn(model(x), y), N_ROWS, loss_fn=loss_fn)


@case(9, "a detached loss", refused="does not depend on any trainable parameter")
def detached() -> float:
    return error_of(Net(), lambda outputs, targets: loss_fn(outputs, targets).detach())


@case(9, "a loss on `argmax`", refused="does not depend on any trainable parameter")
def argmax() -> float:
    return error_of(Net(), lambda outputs, targets: (outputs.argmax(-1) != targets).double().mean())


@case(9, "a loss under `no_grad`", refused="does not depend on any trainable parameter")
def under_no_grad() -> float:
    return error_of(Net(), torch.no_grad()(loss_fn))


@case(9, "a tensor that the backward pass needs is changed in place", refused="backward pass .* in place")
def changed_in_place() -> float:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        probabilities = outputs.softmax(-1)
        probabilities += 1e-8
        return F.nll_loss(probabilities.log(), targets)

    return error_of(Net(), loss)
