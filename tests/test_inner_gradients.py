"""Models and losses that compute gradients in their forward pass train exactly and can be evaluated."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ftaccum import test_fine_tuning
from silent_errors.case import update_error

Loss = Callable[[Any, Any], Tensor]


class Forces(nn.Module):
    """A model that returns the gradient of an energy, as for molecules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.energy = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 1)).double()

    def forward(self, positions: Tensor) -> Tensor:
        positions = positions.detach().requires_grad_()
        return torch.autograd.grad(self.energy(positions).sum(), positions, create_graph=self.training)[0]


class Hooked(Forces):
    """A model that scales a gradient by a hook."""

    def forward(self, positions: Tensor) -> Tensor:
        energy = self.energy(positions)
        energy.register_hook(lambda gradient: 2 * gradient)
        return energy * positions


class Critic(Forces):
    """A model that returns its output and its inputs, for a penalty on the slope."""

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        positions = positions.detach().requires_grad_()
        return self.energy(positions), positions


class Penalized(Forces):
    """A model that computes gradients only in train mode."""

    def forward(self, positions: Tensor) -> Tensor:
        return super().forward(positions) if self.training else positions * self.energy(positions)


def slope(outputs: tuple[Tensor, Tensor], _: Tensor) -> Tensor:
    energy, positions = outputs
    (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
    return (gradient.norm(dim=1) - 1).square().mean()


def rows(n: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(x[0], x[1]) for x in torch.randn(n, 2, 3, dtype=torch.float64, generator=generator)]


CASES = [(Forces, nn.MSELoss()), (Hooked, nn.MSELoss()), (Penalized, nn.MSELoss()), (Critic, slope)]


@pytest.mark.parametrize(("kind", "loss_fn"), CASES)
def test_the_update_is_that_of_one_batch(kind: type[Forces], loss_fn: Loss) -> None:
    x, y = map(torch.stack, zip(*rows(7), strict=True))
    off = update_error(kind(), rows(7), lambda model: loss_fn(model(x), y), 7, loss_fn=loss_fn)
    assert off < 1e-12


@pytest.mark.parametrize(("kind", "loss_fn"), CASES)
def test_the_validation_loss_is_that_of_eval_mode(kind: type[Forces], loss_fn: Loss) -> None:
    x, y = map(torch.stack, zip(*rows(12)[7:], strict=True))
    model = kind()
    result = test_fine_tuning(
        model, train_data=rows(7), val_data=rows(12)[7:], loss_fn=loss_fn, batch_size=2, effective_batch_size=7,
        n_epochs=1, progress=False,
        compute_metrics=lambda predicted: {"largest": max(map(np.max, predicted.predictions))},
    )  # fmt: skip
    model.eval()
    assert result.final_loss == pytest.approx(loss_fn(model(x), y).item(), rel=1e-9)
    assert "largest" in result.metrics[-1]


def test_an_error_in_the_model_is_not_hidden() -> None:
    class Broken(Forces):
        def forward(self, _: Tensor) -> Tensor:
            raise RuntimeError("no such molecule")

    with pytest.raises(ValueError, match="no such molecule"):
        test_fine_tuning(Broken(), train_data=rows(4), loss_fn=nn.MSELoss(), progress=False)
