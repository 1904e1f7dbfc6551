"""Gradients of large linear layers, which the backward pass adds to `weight.grad` in place, against plain autograd."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from ftaccum.runtime.gradients import in_place
from ftaccum.runtime.gradients.in_place import InPlaceGradients
from ftaccum.runtime.gradients.sparse import SparseEmbeddingGradients


class Tied(nn.Module):
    """A tiny language model whose output embedding is its input embedding, used twice in a pass."""

    def __init__(self, *, penalty: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)
        self.head.weight = self.table.weight
        self.penalty = penalty
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids).tanh()
        loss: Tensor = nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), ids.flatten())
        loss = loss + self.head(hidden[:, 0]).square().mean()
        if self.penalty:
            is_trained = self.penalty == "trained"
            (slope,) = torch.autograd.grad(loss, hidden, create_graph=is_trained, retain_graph=True)
            (of_weight,) = torch.autograd.grad(loss, self.head.weight, create_graph=is_trained, retain_graph=True)
            loss = loss + slope.square().sum() + of_weight.square().sum()
        return loss


class Recomputed(nn.Sequential):
    def forward(self, given: Tensor) -> Tensor:
        result: Tensor = checkpoint(super().forward, given, use_reentrant=True)
        return result


@pytest.fixture(autouse=True)
def small_layers_count(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Treat all linear layers as large ones, and return the results of adding: None where it was done in place."""
    results = []
    own = in_place._added

    def added(*args: Any) -> Tensor | None:
        results.append(own(*args))
        return results[-1]

    monkeypatch.setattr(in_place, "_LEAST_BYTES", 0)
    monkeypatch.setattr(in_place, "_added", added)
    return results


def gradients(model: nn.Module, *, adds: bool, sparse: bool = False) -> list[Tensor]:
    """Return the gradients of three passes over ragged batches."""
    draw = torch.Generator().manual_seed(1)
    embeddings = SparseEmbeddingGradients(model, set())
    with (
        InPlaceGradients(model).in_place() if adds else nullcontext(),
        embeddings.sparse() if sparse else nullcontext(),
    ):
        for shape in ((2, 5), (1, 3), (4, 2)):
            model(torch.randint(11, shape, generator=draw)).backward()
            embeddings.collect()
    embeddings.hand_over()
    return [p.grad for p in model.parameters() if p.grad is not None]


def in_place_passes(results: list[Any]) -> int:
    return sum(result is None for result in results)


@pytest.mark.parametrize("sparse", [True, False])
def test_gradients_added_in_place_are_those_of_autograd(small_layers_count: list[Any], sparse: bool) -> None:
    added = gradients(Tied(), adds=True, sparse=sparse)
    assert in_place_passes(small_layers_count) == 4, "two calls in each pass except for the first one"
    torch.testing.assert_close(added, gradients(Tied(), adds=False), rtol=1e-13, atol=1e-15)


def test_complex_weights_get_the_gradients_of_autograd() -> None:
    def run(*, adds: bool) -> Tensor:
        torch.manual_seed(0)
        layer = nn.Linear(3, 2, dtype=torch.complex128)
        with InPlaceGradients(layer).in_place() if adds else nullcontext():
            for _ in range(2):
                layer(torch.randn(4, 3, dtype=torch.complex128)).abs().sum().backward()
        assert layer.weight.grad is not None
        return layer.weight.grad

    torch.testing.assert_close(run(adds=True), run(adds=False), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("penalty", ["trained", "constant"])
def test_gradients_inside_a_forward_pass_are_not_added(small_layers_count: list[Any], penalty: str) -> None:
    added = gradients(Tied(penalty=penalty), adds=True)
    assert in_place_passes(small_layers_count) > 0
    torch.testing.assert_close(added, gradients(Tied(penalty=penalty), adds=False), rtol=1e-12, atol=1e-14)


def test_recomputed_layers_add_once(small_layers_count: list[Any]) -> None:
    def run(*, adds: bool) -> list[Tensor]:
        model = Tied()
        model.head = Recomputed(model.head)  # type: ignore[assignment]
        return gradients(model, adds=adds)

    torch.testing.assert_close(run(adds=True), run(adds=False), rtol=1e-13, atol=1e-15)
    assert in_place_passes(small_layers_count) > 0


def test_hooks_see_whole_gradients(small_layers_count: list[Any]) -> None:
    model = Tied()
    model.head.weight.register_hook(lambda gradient: 2 * gradient)
    plain = Tied()
    plain.head.weight.register_hook(lambda gradient: 2 * gradient)
    torch.testing.assert_close(gradients(model, adds=True), gradients(plain, adds=False), rtol=0, atol=0)
    assert not small_layers_count


@pytest.mark.parametrize("kind", ["frozen", "autocast", "pruned", "subclass"])
def test_other_layers_keep_their_own_way(small_layers_count: list[Any], kind: str) -> None:
    model = Tied().float()
    if kind == "frozen":
        model.head.weight.requires_grad = False
    elif kind == "pruned":
        prune.random_unstructured(model.head, "weight", 0.5)
    elif kind == "subclass":
        model.head.__class__ = type("Scaled", (nn.Linear,), {})
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        gradients(model, adds=True)
    assert not small_layers_count


@pytest.mark.parametrize("post", [False, True])
def test_hooks_that_a_pass_registers_see_whole_gradients(post: bool) -> None:
    def run(*, adds: bool) -> list[Tensor]:
        def double_grad(p: Tensor) -> None:
            p.grad = None if p.grad is None else 2 * p.grad

        model = Tied()
        weight, double = model.head.weight, double_grad if post else lambda given: 2 * given
        passes = iter(range(3))

        def register(*_: Any) -> None:
            if next(passes) == 1:
                (weight.register_post_accumulate_grad_hook if post else weight.register_hook)(double)

        model.register_forward_pre_hook(register)
        return gradients(model, adds=adds)

    torch.testing.assert_close(run(adds=True), run(adds=False), rtol=1e-13, atol=1e-15)


class Wasteless(nn.Module):
    """A model that changes the results of its layers in place, and names their arguments."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(11, 4, dtype=torch.double), nn.Linear(4, 11, dtype=torch.double)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(input=self.table(ids)).mul_(0.5).relu_().logsumexp(-1).mean()


def test_results_may_be_changed_in_place(small_layers_count: list[Any]) -> None:
    added = gradients(Wasteless(), adds=True)
    assert in_place_passes(small_layers_count) == 2
    torch.testing.assert_close(added, gradients(Wasteless(), adds=False), rtol=1e-13, atol=1e-15)


def test_layers_get_their_forward_back_after_an_error() -> None:
    model = Tied()
    with pytest.raises(IndexError), InPlaceGradients(model).in_place():
        model(torch.tensor([[99]]))
    assert "forward" not in vars(model.head)


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_average_gradients_added_in_place(two_processes: Callable[..., str]) -> None:
    printed = two_processes("in_place_of_two.py")
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("FOUND "))[6:])
    assert [n_added for _, n_added in found] == [10, 8]
    assert max(error for error, _ in found) < 1e-14
