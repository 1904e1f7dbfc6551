"""`verify` of losses that read all rows of an update together, and of mixtures of experts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftaccum import Verification, verify
from ftaccum.objective.router_balance import RouterBalance, RouterTotals
from ftaccum.objective.row_terms import ComputedRows
from heads import HEADS
from test_router_windows import moe, routers_in_float64

DRAW = torch.Generator().manual_seed(0)
ROWS = [{"x": torch.randn(3, generator=DRAW), "w": float(n % 3 + 1)} for n in range(7)]


class Contrastive(nn.Module):
    """Compares each row with the next one, and weights it by its position in the update and by a column."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, embeddings: Tensor, batch: Any) -> Tensor:
        unit, n = F.normalize(embeddings, dim=-1), torch.arange(len(embeddings))
        losses = F.cross_entropy(unit @ unit.T * self.scale.exp(), n.roll(1), reduction="none")
        return (losses * (n + 1)).mean() * batch["w"].mean()


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"embedding": self.net(x)}


def verified(loss: Any, **arguments: Any) -> Verification:
    given = {"loss_over": "window", "loss_inputs": lambda outputs, _: outputs["embedding"], "n_splits": 1}
    return verify(
        Encoder(), ROWS, loss_fn=loss, batch_size=2, effective_batch_size=7, progress=False, **given | arguments
    )


def test_a_loss_over_the_window_is_exact_in_every_split() -> None:
    loss = Contrastive()
    loss.scale.grad = torch.ones(())
    found = verified(loss)
    assert found.exact, found
    assert found.floor < 1e-13, "reversed rows are compared in their own order"
    assert {m.rows for m in found.splits} > {7, 1}
    assert "Loss: over all rows of an update together" in str(found)
    peers = {m.split: m for m in found.others}
    assert (peers["loss / k"].gradient_error or 0) > 0.1
    assert "Trainer uses the model's own loss" in found.others[-1].note
    assert loss.scale.dtype == torch.float32
    assert loss.scale.grad == 1.0, "gradients are restored"


def test_inputs_of_several_names_are_exact() -> None:
    def apart(inputs: dict[str, Tensor], batch: Any) -> Tensor:
        return Contrastive()(inputs["embedding"] * 1.0, batch)

    assert verified(apart, loss_inputs=None).exact


def test_a_wrong_gradient_of_the_loss_itself_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where each micro-batch adds the whole gradient of a temperature."""
    of_parameters = ComputedRows.of_parameters

    def thrice(computed: ComputedRows) -> Tensor | None:
        found = of_parameters(computed)
        return None if found is None else 3 * found

    monkeypatch.setattr(ComputedRows, "of_parameters", thrice)
    assert not verified(Contrastive()).exact


def test_a_loss_that_is_not_finite_for_few_rows_is_judged_by_the_others() -> None:
    def spread(embeddings: Tensor, batch: Any) -> Tensor:
        del batch
        return ((embeddings - embeddings.mean(0)) ** 2).sum() / (len(embeddings) - 1)  # NaN for a single row

    found = verified(spread)
    assert found.exact, found
    assert "not finite in one batch" in next(m.note for m in found.splits if m.rows == 1)


@pytest.mark.parametrize("coefficient", [1e-3, 1.0])
@pytest.mark.slow
def test_a_mixture_of_experts_is_exact_over_the_window(coefficient: float) -> None:
    with routers_in_float64():
        found = _of_experts(coefficient)
    assert found.exact, found
    assert max(m.gradient_error or 0 for m in found.splits) < 1e-10
    assert found.reasons == []


@pytest.mark.slow
def test_a_mixture_of_experts_in_the_precision_of_transformers_is_exact() -> None:
    assert _of_experts(1.0).exact


@pytest.mark.slow
def test_a_mixture_of_experts_is_not_exact_over_micro_batches() -> None:
    found = _of_experts(1.0, router_balance="micro_batch")
    assert not found.exact
    assert "depends on the rows of a batch together" in found.reasons[0]


@pytest.mark.slow
def test_a_wrong_balance_over_the_window_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    part = RouterBalance.part

    def of_own_choices(balance: RouterBalance, own: RouterTotals, window: RouterTotals) -> Tensor:
        return part(balance, own, RouterTotals(own.choices_E, window.probabilities_E, window.n_tokens))

    monkeypatch.setattr(RouterBalance, "part", of_own_choices)
    assert not _of_experts(1.0).exact


def _of_experts(coefficient: float, **arguments: Any) -> Verification:
    rows = HEADS["causal LM, Llama"].rows(7)
    return verify(
        moe(coefficient=coefficient),
        rows,
        batch_size=3,
        effective_batch_size=7,
        n_splits=1,
        progress=False,
        **arguments,
    )
