"""The check before the first update: it finds and reports causes of inexact accumulation, and changes no state."""

import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from exactness import window_errors
from ftaccum import DataError, InexactLossError, InexactLossWarning, PaddingWarning, plan, test_fine_tuning
from ftaccum.objective.self_check import measured_objective
from heads import HEADS, RecordingOptimizer, all_in_float64, one_batch, relative_error

ROWS = [{"x": torch.randn(4, generator=torch.Generator().manual_seed(n)).double(), "y": n % 3} for n in range(10)]
ONCE: dict[str, Any] = {"n_epochs": 1, "validation_split": 0.0, "progress": False}
TWICE = {"gradient_accumulation_steps": 2}


class Net(nn.Module):
    """A model with dropout, and a norm between two layers."""

    def __init__(self, norm: nn.Module, width: int = 6, p: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.norm, self.outer = nn.Linear(4, width), norm, nn.Linear(width, 3)
        self.dropout = nn.Dropout(p)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.dropout(F.dropout(self.norm(self.inner(x)), 0.1, self.training)))


class LeavesLayersOut(Net):
    """A model that draws random numbers in train mode without a dropout module."""

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.inner(x))
        return self.outer(inner if self.training and torch.rand(()) < 0.5 else inner.tanh())


def cross_entropy(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch["y"])


def in_batch(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(batch["y"])))


def train(model: nn.Module, loss_fn: Any = cross_entropy, **arguments: Any) -> None:
    test_fine_tuning(model, loss_fn=loss_fn, **{"train_data": ROWS} | ONCE | arguments)


@pytest.mark.parametrize("kind", [Net, LeavesLayersOut])
def test_batch_norm_in_train_mode_is_detected_although_eval_mode_hides_it(kind: type[Net]) -> None:
    words = r"In train mode, 'loss' over .* is up to [\d.]+% off .* BatchNorm1d 'norm' mixes the rows of a batch"
    with pytest.warns(InexactLossWarning, match=words):
        train(kind(nn.BatchNorm1d(6)), **TWICE)


@pytest.mark.parametrize("kind", [Net, LeavesLayersOut])
@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.Identity()], ids=["layer norm", "none"])
def test_random_draws_in_train_mode_cause_no_warning(kind: type[Net], norm: nn.Module) -> None:
    train(kind(norm))  # warnings are errors


def test_batch_norm_with_fixed_statistics_is_exact() -> None:
    class Fixed(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> "Fixed":  # noqa: ARG002
            return super().train(False)

    train(Net(Fixed(6)))


@pytest.mark.parametrize("kind", [Net, LeavesLayersOut])
def test_the_check_changes_no_generators_buffers_modes_or_weights(
    kind: type[Net], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kind(nn.BatchNorm1d(6))
    model.dropout.eval()
    found: list[Any] = []

    def state() -> list[Any]:
        generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        weights = {name: value.tolist() for name, value in model.state_dict().items()}
        return [generators, weights, [m.training for m in model.modules()], [p.grad for p in model.parameters()]]

    def watched(*args: Any, **given: Any) -> Any:
        torch.rand(3), np.random.rand(), random.random()  # so that the generators differ from their initial state
        found.append(state())
        measured = measured_objective(*args, **given)
        found.append(state())
        return measured

    monkeypatch.setattr("ftaccum.training.build_objective.measured_objective", watched)
    with pytest.raises(InexactLossError, match=r"BatchNorm1d 'norm'[^\n]*\nSet `on_inexact='warn'"):
        train(model, on_inexact="error", gradient_accumulation_steps=2)
    assert found[0] == found[1]


def test_the_check_can_be_silenced() -> None:
    train(Net(nn.BatchNorm1d(6)), on_inexact="ignore", **TWICE)
    train(Net(nn.LayerNorm(6)), in_batch, on_inexact="ignore", **TWICE)


def test_an_exact_loss_is_no_error() -> None:
    train(Net(nn.LayerNorm(6)), on_inexact="error")


def test_rows_that_are_compared_with_each_other_are_named() -> None:
    with pytest.warns(
        InexactLossWarning, match=r"A single row has a loss of 0, .* one batch [\d.]+: rows are compared"
    ):
        train(Net(nn.LayerNorm(6)), in_batch, **TWICE)
    with pytest.raises(InexactLossError, match="Set `loss_over='window'`"):
        train(Net(nn.LayerNorm(6)), in_batch, on_inexact="error", **TWICE)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(61, 8), nn.Linear(8, 1)
        self.double()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids).tanh())[..., 0]


TEXTS = HEADS["causal LM, Llama"].rows()


def length_of_rest(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return a squared error over all positions, padding included: a loss that ignores its mask."""
    return (outputs - batch["attention_mask"].flip(1).cumsum(1).flip(1)).square().mean()


def over_tokens(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    mask = batch["attention_mask"]
    return ((outputs - 1).square() * mask).sum() / mask.sum()


def tagger_error(loss_fn: Any, **arguments: Any) -> float:
    """Return the relative error of the only window against one batch in plain PyTorch."""
    rows = [{"input_ids": row["input_ids"]} for row in TEXTS]
    model = Tagger()
    batch = one_batch(rows)
    loss_fn(model(batch["input_ids"]), batch).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    optimizer = RecordingOptimizer(model)
    test_fine_tuning(
        model, train_data=rows, loss_fn=loss_fn, optimizer=optimizer, batch_size=2, effective_batch_size=len(rows),
        gradient_clip_norm=None, **ONCE, **arguments,
    )  # fmt: skip
    return relative_error(optimizer.gradients[0], wanted)


def test_a_loss_that_ignores_its_mask_is_reported_and_exact_at_one_width() -> None:
    with pytest.warns(
        PaddingWarning, match=r"Padding counts in the loss: rows padded .* change their loss by up to [\d.]+%"
    ):
        assert tagger_error(length_of_rest) < 1e-12


def test_a_mean_over_tokens_without_labels_is_counted() -> None:
    assert tagger_error(over_tokens, on_inexact="error") < 1e-12


class Residual(Net):
    """A residual branch whose norm may have a scale of 0, as new ones often have."""

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner(x)
        return self.outer(inner + self.norm(inner))


def test_batch_norm_without_effect_on_the_loss_yet_is_detected() -> None:
    model = Residual(nn.BatchNorm1d(6))
    nn.init.zeros_(model.norm.weight)
    with pytest.warns(InexactLossWarning, match="BatchNorm1d 'norm' mixes the rows of a batch"):
        train(model, **TWICE)


class DrawsByItself(Net):
    """A model that draws from its own generator and counts its passes in a buffer."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(norm)
        self.own = torch.Generator().manual_seed(0)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
            x = x * (torch.rand(x.shape, generator=self.own) > 0.3) / 0.7
        return super().forward(x)


class CountsAndDraws(DrawsByItself):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
            x = x * (torch.rand(x.shape) > 0.3) / 0.7
        return Net.forward(self, x)


@pytest.mark.parametrize("kind", [DrawsByItself, CountsAndDraws])
def test_draws_and_counters_are_not_reported_as_mixing_rows(kind: type[Net]) -> None:
    train(kind(nn.LayerNorm(6)), **TWICE)  # warnings are errors


class Annealed(Net):
    """A model whose loss depends on the number of earlier passes."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(norm, p=0.0)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
        return super().forward(x) * (1 + 0.1 * self.passes)


def test_passes_that_change_state_for_the_next_pass_are_reported() -> None:
    words = r"changes buffers that the next one depends on \(Annealed ''\): two passes over the same rows differ by"
    with pytest.warns(InexactLossWarning, match=words):
        train(Annealed(nn.LayerNorm(6)), **TWICE)


class Penalized(Net):
    """A model that computes a gradient in its forward pass in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        if self.training:
            slopes = torch.autograd.grad(outputs.sum(), self.inner.weight, create_graph=True)[0]
            outputs = outputs + 0 * slopes.sum()
        return outputs


@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.BatchNorm1d(6)])
def test_a_term_without_items_is_not_reported_as_drift(norm: Any) -> None:
    def loss_fn(outputs: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        rare = F.cross_entropy(outputs[batch["y"] > 2], batch["y"][batch["y"] > 2])
        return {"all": F.cross_entropy(outputs, batch["y"]), "rare": rare}

    def count(batch: dict[str, Tensor]) -> dict[str, int]:
        return {"all": len(batch["y"]), "rare": int((batch["y"] > 2).sum())}

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        train(Net(norm()), loss_fn, count_items=count, **TWICE)
    assert not [w for w in warned if "changes buffers that the next one depends on" in str(w.message)]


def test_models_that_differentiate_in_their_forward_pass_are_measured() -> None:
    train(Penalized(nn.LayerNorm(6)), **TWICE)


def test_nothing_is_reported_without_accumulation() -> None:
    for model, loss_fn in ((Net(nn.BatchNorm1d(6)), cross_entropy), (Net(nn.LayerNorm(6)), in_batch)):
        train(model, loss_fn, batch_size=5, on_inexact="error")


def test_rows_that_a_loss_mixes_are_not_cut_by_their_lengths() -> None:
    """Micro-batches keep the size that the user set."""
    rows = [{"input_ids": [5 + n, 7, n] * (n // 3), "labels": float(n)} for n in (3, 45, 6, 3, 48, 6, 3, 6)]
    sizes: list[int] = []

    class Pooling(Tagger):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                sizes.append(len(input_ids))
            mask = attention_mask[..., None]
            return self.norm((self.embed(input_ids) * mask).sum(1) / mask.sum(1)).sum(1)

    def loss(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (outputs - batch["labels"]).square().mean()

    for norm, wanted in ((nn.BatchNorm1d(8), {4}), (nn.LayerNorm(8), {2, 3, 4, 6, 1})):
        model, sizes[:] = Pooling(), []
        model.norm = norm.double()
        test_fine_tuning(
            model, train_data=rows, loss_fn=loss, batch_size=4, effective_batch_size=8, on_inexact="ignore",
            audit=False, planner_costs=[1, 1, 0], **ONCE,
        )  # fmt: skip
        assert set(sizes) <= wanted
        assert (set(sizes) == {4}) == (wanted == {4})


def test_batch_norm_does_not_refuse_a_dummy_micro_batch() -> None:
    """No row of the window has a label."""
    rows = [{"x": row["x"], "y": -100 if n < 4 else row["y"]} for n, row in enumerate(ROWS[:8])]
    order = next(plan(8, n_epochs=1, validation_split=0.0, effective_batch_size=4).windows(0)).rows
    placed = dict(zip([*order, *sorted(set(range(8)) - set(order))], rows, strict=True))
    result = test_fine_tuning(
        Net(nn.BatchNorm1d(6)), train_data=[placed[n] for n in range(8)], batch_size=4, on_inexact="ignore",
        loss_fn=cross_entropy, count_items=lambda b: (b["y"] >= 0).sum(), **ONCE,
    )  # fmt: skip
    assert (result.optimizer_steps, result.skipped_steps) == (1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loss_module_of_sixteen_bits_is_measured_as_the_model_is(dtype: torch.dtype) -> None:
    rows = [(row["x"].to(dtype), torch.tensor(row["y"])) for row in ROWS]
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0], dtype=dtype))
    test_fine_tuning(nn.Linear(4, 3).to(dtype), train_data=rows, loss_fn=loss, **ONCE)


def test_the_check_is_a_few_passes_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class TrainingBeginsError(Exception):
        pass

    def begin(*_: Any) -> None:
        raise TrainingBeginsError

    passes: list[int] = []
    forward = Net.forward
    monkeypatch.setattr(Net, "forward", lambda self, x: (passes.append(len(x)), forward(self, x))[1])
    monkeypatch.setattr("ftaccum.training.build_run.TrainingLoop.train", begin)
    with pytest.raises(TrainingBeginsError):
        train(Net(nn.LayerNorm(6)))
    assert passes
    assert len(passes) <= 26
    assert max(passes) <= 4


@pytest.mark.parametrize(
    ("n_rows", "arguments", "words"),
    [
        (9, {"batch_size": 4}, "micro-batches of update 3 have these numbers of rows: 1.*or give `remainder='carry'`"),
        (4, {"batch_size": 1}, "update 1 have these numbers of rows: 1. Use a `batch_size` of at least 2"),
        (5, {"batch_size": 4, "remainder": "carry", "n_epochs": 5}, r"update 7 have these numbers of rows: 1\.[^']*$"),
        (
            4,
            {"batch_size": 3, "effective_batch_size": 10, "remainder": "carry", "n_epochs": 3},
            "update 1 have these numbers of rows: 3, 3, 3, 1",
        ),
    ],
)
def test_a_micro_batch_of_one_row_that_fails_is_reported_before_training(
    n_rows: int, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        train(Net(nn.BatchNorm1d(6)), on_inexact="ignore", train_data=ROWS[:n_rows], **arguments)


class FourByFour(Tagger):
    """A model that reads tokens in groups of four, so the last ones share a group with padding."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        wide = F.pad(self.embed(input_ids), (0, 0, 0, -input_ids.shape[1] % 4))
        begun = attention_mask[:, ::4, None].bool()
        pooled = wide.unflatten(1, (-1, 4)).mean(2).tanh().masked_fill(~begun, -1.0).amax(1)
        return SequenceClassifierOutput((self.head(pooled)[:, 0] - labels).square().mean(), pooled)


def test_padding_that_matters_only_at_some_lengths_is_detected() -> None:
    draw = torch.Generator().manual_seed(3)
    rows = [
        {"input_ids": torch.randint(1, 61, (n,), generator=draw), "labels": float(n)}
        for n in (4, 4, 4, 4, 5, 7, 8, 8, 8, 12)
    ]
    model = FourByFour()
    with all_in_float64():
        errors = window_errors(model, rows, batch_size=2, effective_batch_size=len(rows))
    assert max(errors) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_of_sixteen_bits_are_measured_in_float32_with_the_weights(dtype: torch.dtype) -> None:
    rows = [(row["x"].to(dtype), torch.tensor(row["y"])) for row in ROWS]
    test_fine_tuning(nn.Linear(4, 3).to(dtype), train_data=rows, loss_fn=nn.CrossEntropyLoss(), **ONCE)
