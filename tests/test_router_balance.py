"""The balance of a mixture of experts over an update: its micro-batches' parts add up to that of one batch."""

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from ftaccum.errors import DataError
from ftaccum.objective.aux_losses import factors_of
from ftaccum.objective.router_balance import RouterBalance, RouterTotals
from heads import HEADS, PAD, Row, one_batch, relative_error

FACTOR, EXPERTS, TOP_K = 0.02, 4, 2
ROWS = HEADS["causal LM, Llama"].rows(7)
SPLITS = {"one row each": [1] * 7, "two, four, one": [2, 4, 1], "one batch": [7]}

_SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "num_experts_per_tok": TOP_K,
    "output_router_logits": True,
    "router_aux_loss_coef": FACTOR,
    "initializer_range": 0.3,
}
MODELS = {
    "Mixtral": (MixtralForCausalLM, MixtralConfig(**_SIZES, num_local_experts=EXPERTS)),
    "Qwen3-MoE": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**_SIZES, num_experts=EXPERTS, moe_intermediate_size=8)),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return _model(request.param)


@pytest.fixture(params=["with a mask", "without a mask"])
def masked(request: pytest.FixtureRequest) -> bool:
    return request.param == "with a mask"


@pytest.mark.parametrize("split", SPLITS)
def test_the_parts_of_a_split_add_up_to_the_models_own_balance_and_gradient(
    model: nn.Module, masked: bool, split: str
) -> None:
    batch = _batch(ROWS, masked)
    one = model(**batch)
    balance = _found(model, one, batch)
    total, gradient = _accumulated(balance, model, _micro_batches(SPLITS[split], masked))
    assert total == pytest.approx(FACTOR * one.aux_loss.item(), rel=1e-6)  # the model's own is rounded to float32
    assert relative_error(gradient, _gradient(model, FACTOR * one.aux_loss)) <= 1e-6


@pytest.mark.parametrize("sizes", [[29], [12, 17], [1] * 29])
def test_the_parts_equal_a_reference_in_float64(masked: bool, sizes: list[int]) -> None:
    logits = _logits(29)
    mask = torch.rand(29).round() if masked else torch.ones(29)
    wanted = FACTOR * _reference(logits, mask, TOP_K)
    (wanted_gradient,) = torch.autograd.grad(wanted, logits)
    pieces = zip(logits.split(sizes, dim=1), mask.split(sizes), strict=True)
    micro_batches = [({"router_logits": tuple(piece)}, {"attention_mask": counted}) for piece, counted in pieces]
    found = sum(_parts(_balance(logits, mask), micro_batches))
    (gradient,) = torch.autograd.grad(found, logits)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-13)
    assert (gradient - wanted_gradient).norm() <= 1e-12 * wanted_gradient.norm()


def test_experts_that_tie_and_experts_that_no_token_chose_count_as_in_the_reference() -> None:
    logits = torch.zeros(2, 9, EXPERTS, dtype=torch.float64)
    logits[:, :, 3] = -50.0  # never chosen
    logits[0, 4:, 1] = 2.0
    logits.requires_grad_()
    mask = torch.ones(9)
    totals = _balance(logits, mask).totals({"router_logits": tuple(logits)}, {"attention_mask": mask})
    assert totals.choices_E[3] == 0
    assert totals.choices_E.sum() == 2 * 9 * TOP_K
    wanted = FACTOR * _reference(logits, mask, TOP_K)
    found = _balance(logits, mask).part(totals, totals)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-13)
    wanted_gradient, gradient = (torch.autograd.grad(value, logits)[0] for value in (wanted, found))
    assert (gradient - wanted_gradient).norm() <= 1e-12 * wanted_gradient.norm()


def test_a_micro_batch_of_padding_adds_nothing(model: nn.Module) -> None:
    batch = _batch(ROWS, masked=True)
    balance = _found(model, model(**batch), batch)
    padding = {**_batch(ROWS[:2], masked=True)}
    padding["attention_mask"] = torch.zeros_like(padding["attention_mask"])
    own = balance.totals(model(**padding), padding)
    assert own.n_tokens == 0
    assert own.stacked().norm() == 0
    window = balance.totals(model(**batch), batch)
    gradient = _gradient(model, balance.part(own, window))
    assert all(g.norm() == 0 for g in gradient.values())
    assert balance.part(own, own) == 0


def test_totals_survive_the_sum_over_processes_as_one_tensor(model: nn.Module) -> None:
    batch = _batch(ROWS, masked=True)
    balance = _found(model, model(**batch), batch)
    shares = [balance.totals(model(**b), b) for b in _micro_batches([3, 4], masked=True)]
    no_row = RouterTotals.of_no_tokens(EXPERTS, "cpu")
    summed = RouterTotals.from_stacked(shares[0].stacked() + shares[1].stacked() + no_row.stacked())
    together = shares[0] + shares[1] + no_row
    assert not summed.probabilities_E.requires_grad
    for name in ("choices_E", "probabilities_E", "n_tokens"):
        assert torch.equal(getattr(summed, name), getattr(together, name))
    assert balance.balance(summed).item() == pytest.approx(model(**batch).aux_loss.item(), rel=1e-6)


def test_one_balance_explains_batches_of_other_padding(model: nn.Module) -> None:
    batch = _batch(ROWS, masked=True)
    balance = _found(model, model(**batch), batch)
    for other in (_batch(ROWS[:3], True), _batch(ROWS, True, left=True), _batch(ROWS[2:], False)):
        assert balance.explains(model(**other), other)


def test_a_balance_that_reads_padding_counts_masked_tokens(model: nn.Module) -> None:
    batch = _batch(ROWS, masked=True)
    outputs = model(**batch)
    ones = torch.ones(batch["attention_mask"].numel())
    outputs.aux_loss = _reference(torch.stack(outputs.router_logits), ones, TOP_K)
    found = RouterBalance.find(model, outputs, batch, "aux_loss", FACTOR)
    assert found is not None
    assert found.totals(outputs, batch).n_tokens == 2 * len(ones)


def test_router_outputs_that_are_probabilities_are_recognized(model: nn.Module) -> None:
    batch = _batch(ROWS, masked=True)
    outputs = model(**batch)
    outputs.router_logits = tuple(layer.softmax(-1) for layer in outputs.router_logits)
    found = RouterBalance.find(model, outputs, batch, "aux_loss", FACTOR)
    assert found is not None
    assert found.balance(found.totals(outputs, batch)).item() == pytest.approx(outputs.aux_loss.item(), rel=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_balance_of_a_model_in_bfloat16_is_recognized(model: nn.Module, autocast: bool) -> None:
    model = model.float() if autocast else model.bfloat16()
    batch = _batch(ROWS, masked=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        one = model(**batch)
    balance = _found(model, one, batch)  # outside of autocast, as in a loop of Accelerate
    assert balance.explains(one, batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert balance.explains(one, batch)


@pytest.mark.parametrize("wrapper", ["PEFT", "a module", "nested", "a list"])
def test_the_config_of_a_model_is_read_wherever_it_is(model: nn.Module, wrapper: str) -> None:
    batch = _batch(ROWS, masked=True)
    wrapped: Any = nn.Module()
    if wrapper == "PEFT":
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    elif wrapper == "a module":
        wrapped.module = model
    elif wrapper == "nested":
        wrapped.config = PreTrainedConfig()
        wrapped.config.text_config = model.config
    else:
        wrapped.config = {"moe_topk": [TOP_K, TOP_K]}
    _found(wrapped, model(**batch), batch)
    # Without a top k in the config, every number would be tried, and this would not matter.
    model.config.num_experts_per_tok = 3
    if wrapper == "a list":
        wrapped.config = {"moe_topk": [3, 3]}
    assert RouterBalance.find(wrapped, model(**batch), batch, "aux_loss", FACTOR) is None


@pytest.mark.parametrize("number", [True, EXPERTS + 1])
def test_numbers_in_the_config_that_are_no_top_k_are_ignored(model: nn.Module, number: int) -> None:
    batch = _batch(ROWS, masked=True)
    other: Any = nn.Module()
    other.config = {"top_k": number}
    assert _found(other, model(**batch), batch).reading.top_k == TOP_K


def test_router_outputs_of_another_name_are_found_by_the_number_of_experts(model: nn.Module) -> None:
    batch = _batch(ROWS, masked=True)
    one = model(**batch)
    integers = tuple(torch.ones(84, EXPERTS, dtype=torch.long) for _ in range(2))
    ragged = (torch.ones(84, EXPERTS), torch.ones(84, EXPERTS + 1))
    outputs = {"indices": integers, "widths": ragged, "none": (), "gates": one.router_logits, "aux_loss": one.aux_loss}
    assert _found(model, outputs, batch).reading.output == "gates"


def test_a_mask_of_another_name_is_found(model: nn.Module) -> None:
    batch = _batch(ROWS, masked=True)
    outputs = model(**batch)
    renamed = {"input_ids": batch["input_ids"], "decoder_attention_mask": batch["attention_mask"]}
    assert _found(model, outputs, renamed).reading.mask == "decoder_attention_mask"


def test_a_mask_that_comes_only_with_later_batches_counts(model: nn.Module) -> None:
    without, padded = _batch(ROWS, masked=False), _batch(ROWS, masked=True)
    balance = _found(model, model(**without), without)
    assert balance.explains(model(**padded), padded)


def test_without_a_top_k_in_the_config_every_number_of_experts_is_tried(model: nn.Module) -> None:
    batch = _batch(ROWS, masked=True)
    found = RouterBalance.find(nn.Module(), model(**batch), batch, "aux_loss", FACTOR)
    assert found is not None
    assert found.reading.top_k == TOP_K


def test_a_config_with_another_top_k_is_not_recognized(model: nn.Module) -> None:
    batch = _batch(ROWS, masked=True)
    model.config.num_experts_per_tok = 3
    assert RouterBalance.find(model, model(**batch), batch, "aux_loss", FACTOR) is None


def test_outputs_without_router_logits_are_not_recognized(model: nn.Module) -> None:
    batch = _batch(ROWS, masked=True)
    outputs = {name: value for name, value in model(**batch).items() if name != "router_logits"}
    assert RouterBalance.find(model, outputs, batch, "aux_loss", FACTOR) is None


def test_a_dense_model_is_not_recognized() -> None:
    dense, batch = HEADS["causal LM, Llama"].model(), _batch(ROWS, masked=True)
    assert RouterBalance.find(dense, dense(**batch), batch, "aux_loss", FACTOR) is None
    assert RouterBalance.find(dense, dense(**batch), batch, "loss", FACTOR) is None


def test_a_factor_that_is_not_a_constant_is_not_recognized(model: nn.Module) -> None:
    batch = _batch(ROWS, masked=True)
    assert RouterBalance.find(model, model(**batch), batch, "aux_loss", math.nan) is None


@pytest.mark.parametrize("factor", [1 + 2e-6, math.inf, math.nan])
def test_another_term_of_the_loss_is_not_taken_for_the_balance(model: nn.Module, factor: float) -> None:
    batch = _batch(ROWS, masked=True)
    outputs = model(**batch)
    outputs.aux_loss = outputs.aux_loss * factor
    assert RouterBalance.find(model, outputs, batch, "aux_loss", FACTOR) is None


def test_the_measured_factor_is_that_of_the_config(model: nn.Module) -> None:
    assert factors_of(model(**_batch(ROWS, True)), "loss")["aux_loss"] == pytest.approx(FACTOR, rel=1e-6)


def test_a_mask_of_another_number_of_tokens_is_an_error(model: nn.Module) -> None:
    batch = _batch(ROWS, masked=True)
    outputs = model(**batch)
    balance = _found(model, outputs, batch)
    shorter = {"attention_mask": batch["attention_mask"][:, 1:]}
    with pytest.raises(DataError, match="`attention_mask` has 77 tokens, but `router_logits` has 84"):
        balance.totals(outputs, shorter)
    assert not balance.explains(outputs, shorter)


def test_outputs_of_another_number_of_experts_are_an_error(model: nn.Module) -> None:
    batch = _batch(ROWS, masked=True)
    outputs = model(**batch)
    balance = _found(model, outputs, batch)
    outputs.router_logits = tuple(layer[:, 1:] for layer in outputs.router_logits)
    with pytest.raises(DataError, match="`router_logits` must be a tensor of 4 experts per layer"):
        balance.totals(outputs, batch)


def _reference(logits_LNE: Tensor, mask_N: Tensor, top_k: int) -> Tensor:
    """Return the balance of all tokens, token by token in plain PyTorch."""
    n_experts = logits_LNE.shape[-1]
    chosen, probability, n = [0] * n_experts, [torch.zeros((), dtype=torch.float64)] * n_experts, 0
    for layer_NE in logits_LNE:
        for token_E, counts in zip(layer_NE, mask_N.tolist(), strict=True):
            if not counts:
                continue
            p_E = token_E.double().exp() / token_E.double().exp().sum()
            for expert in p_E.topk(top_k).indices.tolist():
                chosen[expert] += 1
            probability = [probability[e] + p_E[e] for e in range(n_experts)]
            n += 1
    return n_experts * sum(c / n * p / n for c, p in zip(chosen, probability, strict=True))


def _logits(n: int) -> Tensor:
    return torch.randn(3, n, EXPERTS, dtype=torch.float64).mul(2).requires_grad_()


def _balance(logits: Tensor, mask: Tensor) -> RouterBalance:
    """Return the balance that is found in outputs with these logits of layers."""
    outputs = {"router_logits": tuple(logits), "aux_loss": _reference(logits, mask, TOP_K)}
    found = RouterBalance.find(_model("Mixtral"), outputs, {"attention_mask": mask}, "aux_loss", FACTOR)
    assert found is not None
    return found


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model_class, config = MODELS[name]
    config = copy.deepcopy(config)  # tests change it
    config._experts_implementation = "eager"  # the grouped products do not support float64
    return model_class(config).double()


def _found(model: Any, outputs: Any, batch: dict[str, Tensor]) -> RouterBalance:
    found = RouterBalance.find(model, outputs, batch, "aux_loss", FACTOR)
    assert found is not None
    return found


def _batch(rows: Sequence[Row], masked: bool, left: bool = False) -> dict[str, Tensor]:
    batch = one_batch(rows, left)
    if not masked:
        del batch["attention_mask"]
    return batch


def _micro_batches(sizes: Sequence[int], masked: bool) -> list[dict[str, Tensor]]:
    """Return the rows in micro-batches. Without a mask, padding counts, so that all have the width of one batch."""
    ends = list(itertools.accumulate(sizes))
    pieces = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    if masked:
        return [_batch(ROWS[piece], masked) for piece in pieces]
    return [{name: values[piece] for name, values in _batch(ROWS, masked).items()} for piece in pieces]


def _parts(balance: RouterBalance, micro_batches: Sequence[tuple[Any, Any]]) -> list[Any]:
    """Return the part of each micro-batch, given the outputs and batches of all."""
    with torch.no_grad():
        stacked = sum(balance.totals(outputs, batch).stacked() for outputs, batch in micro_batches)
    window = RouterTotals.from_stacked(stacked)
    return [balance.part(balance.totals(outputs, batch), window) for outputs, batch in micro_batches]


def _accumulated(
    balance: RouterBalance, model: nn.Module, batches: Sequence[dict[str, Tensor]]
) -> tuple[float, dict[str, Tensor]]:
    value = sum(_parts(balance, [(model(**batch), batch) for batch in batches]))
    return value.item(), _gradient(model, value)


def _gradient(model: nn.Module, value: Any) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
