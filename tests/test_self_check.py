"""Before the first update: what makes accumulation inexact is seen, named with its figure, and leaves no trace."""

import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.modeling_outputs import SequenceClassifierOutput

from exactness import window_errors
from ftaccum import DataError, InexactLossError, InexactLossWarning, PaddingWarning, test_fine_tuning
from heads import HEADS, PAD, RecordingOptimizer, all_in_float64, one_batch, relative_error

ROWS = [{"x": torch.randn(4, generator=torch.Generator().manual_seed(n)).double(), "y": n % 3} for n in range(10)]
ONCE: dict[str, Any] = {"n_epochs": 1, "validation_split": 0.0, "progress": False}


class Net(nn.Module):
    """Dropout, and a norm between two layers."""

    def __init__(self, norm: nn.Module, width: int = 6, p: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.norm, self.outer = nn.Linear(4, width), norm, nn.Linear(width, 3)
        self.dropout = nn.Dropout(p)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.dropout(F.dropout(self.norm(self.inner(x)), 0.1, self.training)))


class LeavesLayersOut(Net):
    """Draws in train mode by other means than dropout."""

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
def test_batch_norm_in_train_mode_is_seen_although_eval_mode_hides_it(kind: type[Net]) -> None:
    words = r"In train mode, 'loss' of rows apart is up to [\d.]+% off .* BatchNorm1d 'norm' there takes in the rows"
    with pytest.warns(InexactLossWarning, match=words):
        train(kind(nn.BatchNorm1d(6)))


@pytest.mark.parametrize("kind", [Net, LeavesLayersOut])
@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.Identity()], ids=["layer norm", "none"])
def test_what_is_drawn_in_train_mode_is_taken_for_nothing_else(kind: type[Net], norm: nn.Module) -> None:
    train(kind(norm))  # warnings are errors


def test_batch_norm_with_fixed_statistics_is_exact() -> None:
    class Fixed(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> "Fixed":  # noqa: ARG002
            return super().train(False)

    train(Net(Fixed(6)))


def test_the_check_leaves_generators_buffers_and_weights_alone() -> None:
    model = Net(nn.BatchNorm1d(6))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with pytest.raises(InexactLossError, match=r"BatchNorm1d 'norm'[^\n]*\n`on_inexact='warn'"):
        train(model, on_inexact="error")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert states[:2] == after[:2]
    assert torch.equal(states[2], after[2])


def test_the_check_can_be_told_to_be_silent() -> None:
    train(Net(nn.BatchNorm1d(6)), on_inexact="ignore")
    train(Net(nn.LayerNorm(6)), in_batch, on_inexact="ignore")


def test_an_exact_loss_is_no_error() -> None:
    train(Net(nn.LayerNorm(6)), on_inexact="error")


def test_rows_that_are_compared_with_each_other_are_named() -> None:
    with pytest.warns(InexactLossWarning, match=r"A row by itself costs 0, a few together [\d.]+: rows are compared"):
        train(Net(nn.LayerNorm(6)), in_batch)
    with pytest.raises(InexactLossError, match="make `batch_size` as large"):
        train(Net(nn.LayerNorm(6)), in_batch, on_inexact="error")


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
    """A squared error at each position, those of padding included: a loss that ignores its mask."""
    return (outputs - batch["attention_mask"].flip(1).cumsum(1).flip(1)).square().mean()


def over_tokens(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    mask = batch["attention_mask"]
    return ((outputs - 1).square() * mask).sum() / mask.sum()


def tagger_error(loss_fn: Any, **arguments: Any) -> float:
    """The relative error of the one window of all rows, against one batch in plain PyTorch."""
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


def test_a_loss_that_ignores_its_mask_is_told_and_exact_at_one_width() -> None:
    with pytest.warns(PaddingWarning, match=r"Padding counts in the loss: rows padded .* differ by up to [\d.]+%"):
        assert tagger_error(length_of_rest) < 1e-12


def test_a_mean_over_tokens_without_labels_is_counted() -> None:
    assert tagger_error(over_tokens, on_inexact="error") < 1e-12


class TwoHeads(Tagger):
    """Labels a row and its tokens, adds up both losses, and gives them beside the sum."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.rows, self.weight = nn.Linear(8, 3).double(), weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, row_label: Tensor) -> dict[str, Any]:
        hidden = self.embed(input_ids).tanh()
        logits = hidden @ self.embed.weight.T
        of_tokens = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        pooled = (hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        of_rows = F.cross_entropy(self.rows(pooled), row_label)
        return {"loss": of_tokens + self.weight * of_rows, "of_rows": of_rows, "logits": logits}


@pytest.mark.parametrize("weight", [1.0, 1e-3])
def test_parts_of_a_loss_that_the_outputs_name_are_counted_apart(weight: float) -> None:
    model = TwoHeads(weight)
    rows = [{**row, "row_label": n % 3} for n, row in enumerate(HEADS["masked LM, BERT"].rows())]
    model(**one_batch(rows))["loss"].backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    optimizer = RecordingOptimizer(model)
    test_fine_tuning(
        model, train_data=rows, optimizer=optimizer, batch_size=2, effective_batch_size=len(rows),
        gradient_clip_norm=None, on_inexact="error", **ONCE,
    )  # fmt: skip
    assert relative_error(optimizer.gradients[0], wanted) < 1e-12


def mixtral(coefficient: float) -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=coefficient,
        pad_token_id=PAD,
    )  # fmt: skip
    config._experts_implementation = "eager"  # the grouped products know no float64
    return MixtralForCausalLM(config).double()


@pytest.mark.parametrize("coefficient", [1.0, 1e-3])
def test_a_routers_balance_is_weighted_by_tokens_beside_labels(coefficient: float) -> None:
    """∇ of the window's cross entropy, as one batch has it, and of the mean of the balances, weighted by tokens."""
    rows, size = HEADS["causal LM, Llama"].rows(8), 2
    model, wanted = mixtral(coefficient), mixtral(coefficient)
    micro_batches = [one_batch(rows[n : n + size]) for n in range(0, len(rows), size)]
    items = [int((b["labels"][:, 1:] != -100).sum()) for b in micro_batches]
    tokens = [int(b["attention_mask"].sum()) for b in micro_batches]
    with all_in_float64():
        for b, n, t in zip(micro_batches, items, tokens, strict=True):
            out = wanted(**b)
            balance = coefficient * out.aux_loss
            ((out.loss - balance) * n / sum(items) + balance * t / sum(tokens)).backward()
        optimizer = RecordingOptimizer(model)
        with pytest.warns(InexactLossWarning, match="'aux_loss', .*% of the loss, looks at the rows of a batch"):
            test_fine_tuning(
                model, train_data=_in_the_order_of_training(rows), optimizer=optimizer, batch_size=size,
                effective_batch_size=len(rows), gradient_clip_norm=None, planner=False, **ONCE,
            )  # fmt: skip
    error = relative_error(optimizer.gradients[0], {name: p.grad for name, p in wanted.named_parameters()})
    assert error < 1e-12


def _in_the_order_of_training(rows: list[Any]) -> list[Any]:
    """Such that the first window has them in this order."""
    from ftaccum import plan

    (window,) = plan(len(rows), n_epochs=1, validation_split=0.0, effective_batch_size=len(rows)).windows(0)
    placed = list(rows)
    for row, position in zip(rows, window.rows, strict=True):
        placed[position] = row
    return placed


def test_a_router_whose_batch_is_whole_is_exact() -> None:
    with warnings.catch_warnings(), all_in_float64():
        warnings.simplefilter("ignore", InexactLossWarning)
        errors = window_errors(mixtral(1.0), HEADS["causal LM, Llama"].rows(), batch_size=9)
    assert max(errors) < 1e-12


def test_the_check_is_a_few_passes_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class TrainingBeginsError(Exception):
        pass

    def begin(*_: Any) -> None:
        raise TrainingBeginsError

    passes: list[int] = []
    forward = Net.forward
    monkeypatch.setattr(Net, "forward", lambda self, x: (passes.append(len(x)), forward(self, x))[1])
    monkeypatch.setattr("ftaccum.running.TrainingLoop.train", begin)
    with pytest.raises(TrainingBeginsError):
        train(Net(nn.LayerNorm(6)))
    assert passes
    assert len(passes) <= 24
    assert max(passes) <= 4


@pytest.mark.parametrize(
    ("n_rows", "arguments", "words"),
    [
        (9, {"batch_size": 4}, "update 3, of 1 rows, is cut into 1.*or give `remainder='carry'`"),
        (5, {"batch_size": 4, "remainder": "carry", "n_epochs": 5}, r"update 7, of 1 rows, is cut into 1\.[^']*$"),
        (4, {"batch_size": 3, "effective_batch_size": 10, "remainder": "carry", "n_epochs": 3}, "into 3, 3, 3, 1"),
    ],
)
def test_a_micro_batch_of_one_row_that_the_model_cannot_take_is_told_before_training(
    n_rows: int, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        train(Net(nn.BatchNorm1d(6)), on_inexact="ignore", train_data=ROWS[:n_rows], **arguments)


class FourByFour(Tagger):
    """Takes tokens four by four: what is left over shares its place with padding."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        wide = F.pad(self.embed(input_ids), (0, 0, 0, -input_ids.shape[1] % 4))
        begun = attention_mask[:, ::4, None].bool()
        pooled = wide.unflatten(1, (-1, 4)).mean(2).tanh().masked_fill(~begun, -1.0).amax(1)
        return SequenceClassifierOutput((self.head(pooled)[:, 0] - labels).square().mean(), pooled)


def test_padding_that_matters_to_some_lengths_alone_is_seen() -> None:
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
