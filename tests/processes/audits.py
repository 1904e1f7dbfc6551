"""Audits on two processes: exact heads pass, and both processes find class weights that no measurement saw."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftaccum import InexactLossError, test_fine_tuning
from ftaccum.objective.recount import RareCheck
from ftaccum.objective.report import ExactnessReport
from heads import HEADS

assert os.environ["WORLD_SIZE"] == "2"

for head in (HEADS["causal LM, Llama"], HEADS["question answering, BERT"]):
    result = test_fine_tuning(
        head.model(), train_data=head.rows(11), batch_size=2, gradient_accumulation_steps=2, audit=2, n_epochs=2,
        validation_split=0.0, progress=False, on_inexact="error",
    )  # fmt: skip
    assert result.num_processes == 2
    assert len(result.audits) >= 2
    assert max(audit["error"] for audit in result.audits) < 1e-6

rows = [
    (torch.randn(6, generator=torch.Generator().manual_seed(n)), torch.tensor(int(n % 5 in (0, 1, 4))))
    for n in range(24)
]
weights = torch.tensor([1.0, 9.0])


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, weight=weights)


# Disable the checks before training.
ExactnessReport.inexact = lambda _: []
RareCheck.recounts = lambda *_: {}
torch.manual_seed(0)
with pytest.raises(InexactLossError, match="Audit of update 1"):
    test_fine_tuning(
        nn.Linear(6, 2), train_data=rows, loss_fn=weighted, batch_size=2, gradient_accumulation_steps=2,
        validation_split=0.0, progress=False, on_inexact="error",
    )  # fmt: skip
print("audited")
