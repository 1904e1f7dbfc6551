"""Exactness reports of hand-written figures, and passes that can be repeated."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftaccum.objective.deterministic_forward import DeterministicMode
from ftaccum.objective.probe import Explanation
from ftaccum.objective.report import ExactnessReport, InTraining


def report(
    differences: Mapping[str, float] | None = None,
    in_training: InTraining | None = None,
    *,
    padding: float = 0.0,
    adds_up: bool = False,
    **more: Any,
) -> ExactnessReport:
    differences = differences or {"loss": 0.0}
    terms = list(differences)
    given: dict[str, Any] = {
        "ways": dict.fromkeys(terms, "labels"), "measured": False, "shifts": False,
        "explanation": Explanation(dict(differences), padding, adds_up),
        "in_training": in_training or InTraining(dict.fromkeys(terms, 0.0)),
        "joint": dict.fromkeys(terms, 2.0), "single_rows": dict.fromkeys(terms, 1.0), "parts": (),
        "tolerance": 0.01, "sums": False, "own_loss": False,
    }  # fmt: skip
    return ExactnessReport(**given | more)


def test_an_exact_loss_has_nothing_to_report() -> None:
    exact = report({"loss": 0.01}, InTraining({"loss": 0.01}, drift=0.01))
    assert exact.inexact() == []
    assert exact.counted_by == "labels"
    assert not exact.mixes_rows
    assert exact.padding() is None
    assert report(measured=True).counted_by == "labels (measured)"


def test_terms_are_named_where_there_are_several() -> None:
    found = report({"a": 0.0, "b": 0.5, "c": 0.0}, InTraining({"a": 0.0, "b": 0.7, "c": 0.3}), measured=True)
    assert (
        found.counted_by
        == "labels for 'a'; labels for 'b', only approximately; labels for 'c', only approximately in train mode"
    )
    assert found.mixes_rows


def test_a_loss_that_no_count_explains_is_reported_with_its_error() -> None:
    (sentence,) = report({"loss": 0.5}).inexact()
    assert sentence.startswith(
        "The loss is not a mean over items that can be counted, such as labels or rows: 'loss' over separate "
        "micro-batches, weighted"
    )
    assert "is up to 50% off" in sentence
    assert "Accumulating it only approximates one large batch." in sentence
    assert "is up to 2% off" in report({"loss": 0.02}).inexact()[0]
    assert "is up to 10% off" in report({"loss": 0.1}).inexact()[0]
    assert "is up to 1.2% off" in report({"loss": 0.0123}).inexact()[0]


def test_an_undeclared_sum_is_reported() -> None:
    assert "set `reduction='sum'`" in report({"loss": 0.5}, adds_up=True).inexact()[0]
    assert "reduction='sum'" not in report({"loss": 0.5}, adds_up=True, sums=True).inexact()[0]


def test_near_zero_losses_of_single_rows_mean_that_rows_are_compared() -> None:
    def compares(alone: float, joint: float = 2.0) -> bool:
        (sentence,) = report({"loss": 0.5}, single_rows={"loss": alone}, joint={"loss": joint}).inexact()
        return "rows are compared with each other" in sentence

    assert compares(0.001)
    assert compares(-0.001)
    assert compares(0.001, -2.0)
    assert not compares(0.002)
    assert not compares(-1.0)


def test_a_part_of_the_loss_is_reported_with_its_share() -> None:
    of_part = report({"loss": 0.0, "balance": 0.5}, parts=("balance",), joint={"loss": 3.0, "balance": -1.0})
    (sentence,) = of_part.inexact()
    assert sentence.startswith("'balance', 25% of the loss, depends on the rows of a batch together")
    assert not of_part.mixes_rows, "the main loss does not"
    (without,) = report(
        {"loss": 0.0, "balance": 0.5}, parts=("balance",), joint={"loss": 0.0, "balance": 0.0}
    ).inexact()
    assert without.startswith("'balance' depends on")
    both = report({"loss": 0.5, "balance": 0.5}, parts=("balance",)).inexact()
    assert [sentence.split()[0] for sentence in both] == ["'balance',", "The"]


def test_a_part_that_only_train_mode_mixes_is_a_part() -> None:
    found = report({"loss": 0.0, "balance": 0.0}, InTraining({"loss": 0.0, "balance": 0.4}), parts=("balance",))
    (sentence,) = found.inexact()
    assert "'balance' over separate micro-batches, weighted by labels, is up to 40% off" in sentence
    assert not found.mixes_rows


def test_mixing_in_train_mode_is_reported_with_the_modules() -> None:
    def told(mixing: list[str], complaint: str | None = None) -> str:
        differences = {"a": 0.2, "b": 0.6, "c": 0.0}
        (sentence,) = report(dict.fromkeys(differences, 0.0), InTraining(differences, 0.0, mixing, complaint)).inexact()
        return sentence

    assert "'b' over separate micro-batches is up to 60% off its value for the same rows in one batch" in told([])
    assert ": something mixes the rows of a batch, so" in told([])
    assert ": A mixes the rows of a batch, so" in told(["A"])
    assert ": A, B, C mix the rows" in told(["A", "B", "C"])
    assert ": A, B, C, … mix the rows" in told(["A", "B", "C", "D"])
    assert "cannot be computed" not in told(["A"])
    assert "A micro-batch of a single row cannot be computed at all (too few)." in told(["A"], "too few")
    assert report(None, InTraining({"loss": 0.2})).mixes_rows


def test_passes_that_drift_are_reported() -> None:
    (sentence,) = report(None, InTraining({"loss": 0.0}, 0.3, ["A", "B", "C", "D"])).inexact()
    assert "a forward pass changes buffers that the next one depends on (A, B, C)" in sentence
    assert "differ by 30%" in sentence


def test_padding_that_counts_is_reported_for_a_loss_given_by_the_user() -> None:
    assert "change their loss by up to 25%" in str(report(padding=0.25).padding())
    assert report(padding=0.25, own_loss=True).padding() is None
    assert report(padding=0.0, own_loss=False).padding() is None


class Drawing(nn.Module):
    """A model with dropout from a module and a function, batch norm, and optional noise of its own."""

    def __init__(self, noise: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.drop, self.noise = nn.BatchNorm1d(4), nn.Dropout(0.5), noise

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.drop(self.norm(x)), 0.5, self.training)
        return x + torch.rand(()) if self.noise and self.training else x


def deterministic(model: nn.Module) -> tuple[DeterministicMode, list[float]]:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    mode = DeterministicMode.of(model, lambda: model(x).flatten().tolist())
    assert torch.equal(torch.get_rng_state(), state), "generators are as they were"
    with mode.passes():
        found = model(x).flatten().tolist()
    assert int(sum(b.sum() for name, b in model.named_buffers() if name.endswith("num_batches_tracked"))) == 0
    return mode, found


def test_dropout_is_off_in_train_mode() -> None:
    model = Drawing().eval()
    mode, found = deterministic(model)
    assert (mode.whole, list(mode.moving)) == (True, ["norm"])
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    wanted = F.batch_norm(x, None, None, training=True).flatten().tolist()
    assert found == pytest.approx(wanted, rel=1e-5)
    assert not any(module.training for module in model.modules())
    assert model.drop.p == 0.5


def test_a_model_that_draws_is_in_eval_mode_except_modules_with_running_state() -> None:
    mode, found = deterministic(Drawing(noise=True))
    assert (mode.whole, list(mode.moving)) == (False, ["norm"])
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    assert found == pytest.approx(F.batch_norm(x, None, None, training=True).flatten().tolist(), rel=1e-5)


def test_a_module_that_has_running_state_and_draws_stays_in_eval_mode() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.seen += torch.rand(())
            return x + self.seen

    model = Counting()
    x = torch.ones(2)
    mode = DeterministicMode.of(model, lambda: model(x).tolist())
    assert (mode.whole, dict(mode.moving)) == (False, {})
    with mode.passes():
        assert model(x).tolist() == [1.0, 1.0]
    assert float(model.seen) == 0.0


def test_nan_outputs_and_rounding_count_as_repeatable() -> None:
    model = nn.Identity()
    assert DeterministicMode.of(model, lambda: [float("nan"), 1.0]).whole
    outputs = iter([[1.0], [1.001], [1.0], [1.0]])
    assert not DeterministicMode.of(model, lambda: next(outputs)).whole
    close = iter([[1.0], [1.0 + 1e-7]])
    assert DeterministicMode.of(model, lambda: next(close)).whole


@pytest.mark.parametrize("positional", [True, False])
def test_attention_has_no_dropout(positional: bool) -> None:
    q = torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    wanted = F.scaled_dot_product_attention(q, q, q)
    with DeterministicMode(nn.Identity(), True, {}).passes():
        found = (
            F.scaled_dot_product_attention(q, q, q, None, 0.9)
            if positional
            else F.scaled_dot_product_attention(q, q, q, dropout_p=0.9)
        )
        assert torch.equal(F.dropout(q, 0.9), q)
        assert torch.equal(F.dropout(input=q, p=0.9), q)
        assert torch.equal(F.alpha_dropout(q, 0.9, True), q)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_attention_module_has_no_dropout(batch_first: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, dropout=0.9, batch_first=batch_first)
    x = torch.randn(3, 5, 4)
    wanted = attention.eval()(x, x, x, need_weights=False)[0]
    with DeterministicMode(attention, True, {}).passes():
        assert attention.training
        assert torch.allclose(attention(x, x, x, need_weights=False)[0], wanted, atol=1e-6)
    assert attention.dropout == 0.9


def test_recomputation_by_gradient_checkpointing_has_no_dropout() -> None:
    class Checkpointing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64))
            self._gradient_checkpointing_func = torch.utils.checkpoint.checkpoint

        def forward(self, x: Tensor) -> Tensor:
            return self._gradient_checkpointing_func(lambda x: F.dropout(self.weight * x, 0.5, True) ** 2, x)

    model, x = Checkpointing(), torch.arange(64.0)
    before = model._gradient_checkpointing_func
    with ExitStack() as stack:
        stack.enter_context(DeterministicMode(model, True, {}).passes())
        model(x).sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == (2 * x**2).tolist()
    assert model._gradient_checkpointing_func is before
