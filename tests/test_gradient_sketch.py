"""Sketches of gradients, and comparisons of one batch with separate rows by sketches."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftaccum.errors import SettingsError
from ftaccum.objective.gradient_check import GradientCheck, GradientDifference, difference_of
from ftaccum.objective.gradient_sketch import GradientSketch, sketch_gradients

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()


def sketch_of(**gradients: Tensor) -> GradientSketch:
    sketch = GradientSketch()
    for name, gradient in gradients.items():
        sketch.add(name, gradient)
    return sketch


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


def mean_square(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    return {"loss": model(batch).square().mean()}


def check_of(model: nn.Module, run: Any = mean_square) -> GradientCheck:
    return GradientCheck(model, lambda batch: run(model, batch), {"loss": len})


@pytest.mark.parametrize("shape", [(1,), (1023,), (1024,), (32, 32)])
def test_the_norm_of_a_small_gradient_is_exact(shape: tuple[int, ...]) -> None:
    gradient = torch.randn(shape, dtype=torch.float64)
    assert sketch_of(a=gradient).norm() == pytest.approx(gradient.norm().item(), rel=1e-14)


@pytest.mark.parametrize("n", [1025, 5000, 300_000])
def test_the_norm_of_a_large_gradient_is_estimated(n: int) -> None:
    for seed in range(10):
        gradient = torch.randn(n, generator=torch.Generator().manual_seed(seed))
        assert sketch_of(a=gradient).norm() == pytest.approx(gradient.norm().item(), rel=0.09)


def test_the_norm_of_a_large_gradient_of_equal_numbers_is_estimated() -> None:
    assert sketch_of(a=torch.ones(5_000_000)).norm() == pytest.approx(5_000_000**0.5, rel=0.09)  # four standard errors


def test_sketches_add_up_and_subtract() -> None:
    one, other = torch.randn(2, 5000, dtype=torch.float64)
    both = sketch_of(a=one)
    both.add("a", other)
    assert both.minus(sketch_of(a=one + other)).norm() < 1e-12
    missing = sketch_of(a=one, b=other).minus(sketch_of(a=one))
    assert missing.norms() == {"a": 0.0, "b": pytest.approx(sketch_of(b=other).norm())}


def test_gradients_of_any_kind_are_sketched() -> None:
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 1, 3]]), torch.ones(3, 2), (5, 2), check_invariants=True)
    assert sketch_of(a=sparse).norm() == pytest.approx(10**0.5)
    assert sketch_of(a=torch.tensor([3 + 4j, 0j])).norm() == pytest.approx(5.0)
    assert sketch_of(a=torch.full((4,), 2.0, dtype=torch.bfloat16)).norm() == 4.0


def test_sketching_does_not_change_gradients_or_hooks() -> None:
    model, called = linear(), []
    model.weight.grad = torch.full_like(model.weight, 7.0)
    model.weight.register_post_accumulate_grad_hook(lambda _: called.append(1))
    with sketch_gradients(model) as sketch:
        mean_square(model, X)["loss"].backward()
    assert set(sketch.sums) == {"weight", "bias"}
    assert model.weight.grad.unique().tolist() == [7.0]
    assert model.bias.grad is None
    assert not called
    mean_square(model, X)["loss"].backward()
    assert called == [1]


def test_a_mean_over_rows_has_no_difference() -> None:
    check = check_of(linear())
    found = check.difference(check.together(X), X, [X[:1], X[1:]], X.flip(0), 1e-10)
    assert found == GradientDifference()


def test_a_clamped_gradient_differs_and_its_parameter_is_named() -> None:
    model = linear()
    model.bias.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    check = check_of(model)
    found = check.difference(check.together(X), X, [X[:1], X[1:]], X.flip(0), 1e-4)
    assert found.tensors == ["bias"]
    assert 0 < found.off < 1


def test_differences_that_the_order_of_rows_also_causes_are_rounding() -> None:
    noise = torch.Generator().manual_seed(0)

    def noisy(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": (model(batch) + 1e-3 * torch.randn(len(batch), 2, generator=noise)).square().mean()}

    check = check_of(linear(), noisy)
    parts = [X[:1], X[1:]]
    assert check.difference(check.together(X), X, parts, X.flip(0), 1e-6) == GradientDifference()
    assert check.difference(check.together(X), X, parts, None, 1e-6).off > 0


def cancelling() -> tuple[nn.Module, Tensor, list[Tensor]]:
    """Return a model, six rows whose gradients nearly cancel out in float32, and the rows in three parts.

    Their gradient is 3e-7. In three parts it rounds to one that is 1.5e-8 off, and in reverse order to the same one.
    """
    third = 1 / 3
    rows = torch.tensor([[1.0], [third], [-1 - third + 1e-6], [-1 - third + 1e-6], [third], [1.0]])
    return nn.Linear(1, 1, bias=False), rows, [rows[:1], rows[1:3], rows[3:]]


def mean(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    return {"loss": model(batch).mean()}


def test_differences_that_vanish_in_float64_are_rounding() -> None:
    model, rows, parts = cancelling()
    check = check_of(model, mean)
    model.weight.grad = torch.ones(1, 1)
    before = model.weight.data
    together = check.together(rows)
    assert difference_of(together, check.gradient(parts), lambda: check.gradient([rows.flip(0)]), 1e-4).off > 0.01
    assert check.difference(together, rows, parts, rows.flip(0), 1e-4) == GradientDifference()
    assert model.weight.data_ptr() == before.data_ptr()
    assert (model.weight.dtype, model.weight.grad.dtype) == (torch.float32, torch.float32)
    assert model.weight.grad.item() == 1.0


def test_faults_of_a_float32_model_are_found() -> None:
    model = linear().float()
    model.bias.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    check, rows = check_of(model), X.float()
    found = check.difference(check.together(rows), rows, [rows[:1], rows[1:]], rows.flip(0), 1e-4)
    assert found.tensors == ["bias"]
    assert 0 < found.off < 1


def test_differences_of_a_model_that_cannot_run_in_float64_are_reported() -> None:
    def in_float32(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        assert model.weight.dtype == torch.float32
        return mean(model, batch)

    model, rows, parts = cancelling()
    check = check_of(model, in_float32)
    assert check.difference(check.together(rows), rows, parts, rows.flip(0), 1e-4).off > 0.01
    assert model.weight.dtype == torch.float32


def test_a_loss_without_a_gradient_is_an_error() -> None:
    with pytest.raises(SettingsError, match="does not depend on any trainable parameter"):
        check_of(linear(), lambda model, batch: {"loss": model(batch).mean().detach()}).together(X)


def test_a_backward_pass_that_fails_is_an_error() -> None:
    def in_place(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        outputs = model(batch).exp()
        outputs += 1
        return {"loss": outputs.mean()}

    with pytest.raises(SettingsError, match=r"backward pass of the loss fails: .*make a new one instead"):
        check_of(linear(), in_place).together(X)
