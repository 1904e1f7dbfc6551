"""16-bit copies of gathered weights, which autograd does not keep."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ftaccum.runtime.sharding.recast import RecastWeights


class Watched(RecastWeights):
    """Records the shapes of the 16-bit tensors that autograd keeps."""

    kept: list[tuple[int, ...]]

    def _pack(self, tensor: Tensor) -> Any:
        saved = super()._pack(tensor)
        if isinstance(saved, Tensor) and saved.dtype == torch.bfloat16:
            self.kept.append(tuple(saved.shape))
        return saved


def gradients(recast: bool, kept: list[tuple[int, ...]], frozen: bool = False) -> list[Tensor | None]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.GELU(), Conv1D(7, 9), nn.LayerNorm(7), nn.Linear(7, 5, bias=False))
    model[0].weight.requires_grad_(not frozen)
    watched = Watched({id(p) for p in model.parameters()} if recast else set())
    watched.kept = kept
    inputs = torch.randn(2, 4, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), watched.saved():
        loss = model(inputs).float().square().sum()
    with torch.no_grad():
        again = [p.clone() for p in model.parameters()]
        for p in model.parameters():  # as FSDP2 does: freed after the forward pass, and gathered for the backward pass
            p.data = torch.full_like(p, torch.nan)
        for p, values in zip(model.parameters(), again, strict=True):
            p.data = values
    loss.backward()
    return [p.grad for p in model.parameters()]


def test_copies_of_weights_are_made_again_with_the_same_gradients() -> None:
    kept: list[tuple[int, ...]] = []
    kept_otherwise: list[tuple[int, ...]] = []
    again, wanted = gradients(True, kept), gradients(False, kept_otherwise)
    assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True) if a is not None and b is not None)
    weights = {(6, 9), (9, 6), (9, 7), (7, 5), (5, 7)}
    assert len(weights & set(kept_otherwise)) == 3
    assert weights & set(kept) == set()


def test_the_backward_pass_reads_the_weights_of_then() -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    inputs = torch.ones(1, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), RecastWeights({id(weight)}).saved():
        loss = nn.functional.linear(inputs, weight).sum()
    weight.data = torch.full((3, 2), 2.0)
    loss.backward()
    assert inputs.grad is not None
    assert inputs.grad.tolist() == [[6.0, 6.0]]


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_weights_and_other_tensors_are_kept_as_they_are(frozen: bool) -> None:
    again, wanted = gradients(True, [], frozen), gradients(False, [], frozen)
    assert [a is None for a in again] == [b is None for b in wanted] == [frozen] + [False] * 6
    assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True) if a is not None and b is not None)
