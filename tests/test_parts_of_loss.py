"""Losses that are the sum of several means: each part that the outputs name is counted separately."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from exactness import window_errors
from ftaccum import InexactLossWarning, plan, test_fine_tuning
from heads import HEADS, PAD, RecordingOptimizer, all_in_float64, one_batch, relative_error

ONCE: dict[str, Any] = {"n_epochs": 1, "validation_split": 0.0, "progress": False}


class TwoHeads(nn.Module):
    """A classifier of tokens and rows. It adds up both mean losses and returns `outputs` of them."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.rows, self.scale = nn.Embedding(61, 8), nn.Linear(8, 3), nn.Parameter(torch.tensor(0.3))
        self._of = outputs
        self.double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, row_label: Tensor) -> dict[str, Any]:
        hidden = self.embed(input_ids).tanh()
        logits = hidden @ self.embed.weight.T
        of_tokens = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        pooled = (hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        of_rows = F.cross_entropy(self.rows(pooled), row_label)
        return self._of(self, of_tokens, of_rows) | {"logits": logits}


def two_heads_error(outputs: Any, **arguments: Any) -> float:
    """Return the relative error of one window's gradient against one batch."""
    model = TwoHeads(outputs)
    rows = [{**row, "row_label": n % 3} for n, row in enumerate(HEADS["masked LM, BERT"].rows())]
    model(**one_batch(rows))["loss"].backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    optimizer = RecordingOptimizer(model)
    test_fine_tuning(
        model, train_data=rows, optimizer=optimizer, batch_size=2, effective_batch_size=len(rows),
        gradient_clip_norm=None, **ONCE, **arguments,
    )  # fmt: skip
    return relative_error(optimizer.gradients[0], wanted)


EXACT = {
    "one of them": lambda _, t, r: {"loss": t + r, "rows": r},
    "one at a small weight": lambda _, t, r: {"loss": t + 1e-3 * r, "rows": r},
    "both": lambda _, t, r: {"loss": t + r, "tokens": t, "rows": r},
    "the one of tokens": lambda _, t, r: {"loss": 0.5 * t + r, "tokens": t},
    "one under two names": lambda _, t, r: {"loss": t + r, "rows": r, "again": r},
    "one, and what was made of it": lambda _, t, r: {"loss": t + r, "rows": r, "perplexity": t.exp(), "twice": 2 * r},
    "an alias of the loss": lambda _, t, __: {"loss": 1.0 * t, "nll": t},
    "the losses of two rows": lambda _, t, __: {"loss": t, "losses": t.expand(2) * 1, "count": 2, "nothing": None},
}


@pytest.mark.parametrize("name", EXACT)
def test_parts_that_the_outputs_name_are_counted_separately(name: str) -> None:
    assert two_heads_error(EXACT[name], on_inexact="error") < 1e-12


def test_a_learnt_factor_is_not_mistaken_for_a_constant() -> None:
    def learnt(model: TwoHeads, of_tokens: Tensor, of_rows: Tensor) -> dict[str, Tensor]:
        return {"loss": of_tokens + (-model.scale).exp() * of_rows + model.scale, "rows": of_rows}

    with pytest.warns(InexactLossWarning, match="have `loss_fn` return them by name"):
        two_heads_error(learnt)


def test_a_part_that_only_train_mode_has_is_found() -> None:
    def balance(model: TwoHeads, of_tokens: Tensor, of_rows: Tensor) -> dict[str, Any]:
        mixed = 1e-3 * of_rows**2
        return {"loss": of_tokens + mixed, "mixed": mixed} if model.training else {"loss": of_tokens, "mixed": None}

    with pytest.warns(InexactLossWarning, match="'mixed' depends on the rows of a batch together"):
        two_heads_error(balance)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_settings_for_the_whole_loss_apply_to_all_its_parts(reduction: str) -> None:
    """`count_items` and sums apply to the loss as it is: no part is separated from it."""
    draw = torch.Generator().manual_seed(0)
    rows = [{"x": torch.randn(3, generator=draw).double(), "w": float(n % 4 + 1), "labels": float(n)} for n in range(9)]

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(3, 1).double()

        def forward(self, x: Tensor, w: Tensor, labels: Tensor) -> dict[str, Tensor]:
            outputs = self.net(x)[:, 0]
            by = w.sum() if reduction == "mean" else 1
            one, other = (w * (outputs - labels).square()).sum() / by, (w * outputs.abs()).sum() / by
            return {"loss": one + other, "other": other}

    model = Weighted()
    batch = {name: torch.stack([torch.as_tensor(row[name]).double() for row in rows]) for name in rows[0]}
    (model(**batch)["loss"] / (1 if reduction == "mean" else batch["w"].sum())).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    optimizer = RecordingOptimizer(model)
    test_fine_tuning(
        model, train_data=rows, optimizer=optimizer, batch_size=2, effective_batch_size=len(rows), reduction=reduction,
        count_items=lambda b: b["w"].sum(), gradient_clip_norm=None, on_inexact="error", **ONCE,
    )  # fmt: skip
    assert relative_error(optimizer.gradients[0], wanted) < 1e-12


def mixtral(coefficient: float) -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=coefficient,
        pad_token_id=PAD,
    )  # fmt: skip
    config._experts_implementation = "eager"  # the grouped products do not support float64
    return MixtralForCausalLM(config).double()


@pytest.mark.parametrize("coefficient", [1.0, 1e-3])
def test_a_router_balance_of_micro_batches_is_weighted_by_tokens_and_the_loss_by_labels(coefficient: float) -> None:
    """The gradient is that of the cross entropy in one batch plus that of the balances' mean, weighted by tokens."""
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
        with pytest.warns(InexactLossWarning, match="'aux_loss', .*% of the loss, depends on the rows of a batch"):
            test_fine_tuning(
                model, train_data=_in_the_order_of_training(rows), optimizer=optimizer, batch_size=size,
                effective_batch_size=len(rows), gradient_clip_norm=None, planner=False, router_balance="micro_batch",
                **ONCE,
            )  # fmt: skip
    error = relative_error(optimizer.gradients[0], {name: p.grad for name, p in wanted.named_parameters()})
    assert error < 1e-12


def _in_the_order_of_training(rows: list[Any]) -> list[Any]:
    """Place the rows so that the first window has them in this order."""

    (window,) = plan(len(rows), n_epochs=1, validation_split=0.0, effective_batch_size=len(rows)).windows(0)
    placed = list(rows)
    for row, position in zip(rows, window.rows, strict=True):
        placed[position] = row
    return placed


def test_a_router_whose_batch_is_whole_is_exact() -> None:
    with warnings.catch_warnings(), all_in_float64():
        warnings.simplefilter("ignore", InexactLossWarning)
        errors = window_errors(
            mixtral(1.0), HEADS["causal LM, Llama"].rows(), batch_size=9, router_balance="micro_batch"
        )
    assert max(errors) < 1e-12
