"""Print the errors of Liger's loss and gradient on a CPU, in Triton's interpreter, and those of all logits in one.

A script, because Triton reads the environment variable TRITON_INTERPRET on being imported.
"""

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftaccum.objective import liger_loss
from ftaccum.objective.chunked_loss import ChunkedLoss

N, H, V = 21, 16, 50
SCALE = 0.37  # of the loss: the backward pass gets another gradient than 1
Loss = Callable[[nn.Linear, Tensor, Tensor], Tensor | None]


class Tied(nn.Module):
    """An embedding table that is also the weight of the head, in a model of nothing else."""

    def __init__(self, dtype: torch.dtype, *, bias: bool, is_tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(V, H, dtype=dtype), nn.Linear(H, V, bias=bias, dtype=dtype)
        if is_tied:
            self.head.weight = self.table.weight


def all_logits(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets)


def by_liger(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor | None:
    assert liger_loss.liger_loss(hidden, targets, head, 8) is not None, "not another way"
    return ChunkedLoss(head, 8)(hidden, targets)


def run(model: Tied, way: Loss, *, autocast: bool, grad: bool) -> dict[str, Tensor]:
    """Return the loss and the gradient of each weight, in float64."""
    torch.manual_seed(1)
    tokens, targets = torch.randint(V, (2, N))
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = way(model.head, model.table(tokens), targets)
    assert loss is not None
    found = {"loss": loss.detach().double()}
    if grad:
        (SCALE * loss).backward()
        found |= {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return found


def errors(
    dtype: torch.dtype, *, bias: bool = False, is_tied: bool = False, frozen: bool = False, **options: Any
) -> dict[str, dict[str, float]]:
    """Return the relative errors of both ways against all logits in float32, of the same weights."""
    model = Tied(dtype, bias=bias, is_tied=is_tied)
    model.head.requires_grad_(not frozen)
    options = {"autocast": False, "grad": True} | options
    wanted = run(copy.deepcopy(model).float(), all_logits, **options | {"autocast": False})
    found = {name: run(copy.deepcopy(model), way, **options) for name, way in WAYS.items()}
    assert all(each.keys() == wanted.keys() for each in found.values()), [wanted.keys(), found]
    return {
        name: {way: float((each[name] - wanted[name]).norm() / wanted[name].norm()) for way, each in found.items()}
        for name in wanted
    }


WAYS: dict[str, Loss] = {"liger": by_liger, "all logits": all_logits}
F32, BF16 = torch.float32, torch.bfloat16
CASES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": F32},
    "float32, bias": {"dtype": F32, "bias": True},
    "float32, tied": {"dtype": F32, "is_tied": True},
    "float32, frozen head": {"dtype": F32, "bias": True, "frozen": True},
    "float32, no gradient": {"dtype": F32, "grad": False},
    "bf16": {"dtype": BF16},
    "bf16, bias": {"dtype": BF16, "bias": True},
    "bf16, tied": {"dtype": BF16, "is_tied": True},
    "bf16, frozen head": {"dtype": BF16, "bias": True, "frozen": True},
    "autocast to bf16": {"dtype": F32, "autocast": True},
    "autocast to bf16, bias": {"dtype": F32, "autocast": True, "bias": True},
    "autocast to bf16, tied": {"dtype": F32, "autocast": True, "is_tied": True},
    "autocast to bf16, no gradient": {"dtype": F32, "autocast": True, "grad": False},
}

if __name__ == "__main__":
    liger_loss._DEVICES = ("cpu",)
    print(json.dumps({name: errors(**case) for name, case in CASES.items()}))
