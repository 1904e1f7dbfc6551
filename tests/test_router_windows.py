"""The balance of experts over an update: gradients of mixtures of experts are those of one batch, however it is cut.

Transformers computes parts of a mixture of experts in float32. Most tests replace these parts by the same in float64,
both in training and in the reference, which is one batch in plain PyTorch with the model's own loss.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe

from exactness import accumulated_gradients, window_errors
from ftaccum import InexactLossWarning, test_fine_tuning
from ftaccum.objective.router_terms import RouterTerms
from heads import HEADS, IGNORED, PAD, Row, all_in_float64, one_batch, one_batch_gradient, relative_error
from slow_parameters import some_slow

ROWS = HEADS["causal LM, Llama"].rows()  # 9 rows of 3 to 12 tokens
EXPERTS, TOP_K = 4, 2
WHOLE: dict[str, Any] = {"effective_batch_size": len(ROWS), "planner": False, "on_inexact": "error", "audit": False}

_SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": PAD, "num_experts_per_tok": TOP_K,
    "output_router_logits": True, "initializer_range": 0.3,
}  # fmt: skip
MODELS = {
    "Mixtral": (MixtralForCausalLM, MixtralConfig(**_SIZES, num_local_experts=EXPERTS)),
    "Qwen3-MoE": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**_SIZES, num_experts=EXPERTS, moe_intermediate_size=8)),
}


def moe(name: str = "Mixtral", coefficient: float = 1.0, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model_class, config = MODELS[name]
    config = copy.deepcopy(config)
    for setting, value in {"router_aux_loss_coef": coefficient, **settings}.items():
        setattr(config, setting, value)
    config._experts_implementation = "eager"  # the grouped products do not support float64
    return model_class(config).double()


def balance_in_float64(
    gate_logits: Any, num_experts: Any = None, top_k: int = 2, attention_mask: Tensor | None = None
) -> Any:
    """Return the balance of Transformers' `load_balancing_loss_func` in float64."""
    if not gate_logits:
        return 0
    probabilities = torch.cat(gate_logits).double().softmax(-1)
    counted = torch.ones(len(gate_logits[0])) if attention_mask is None else attention_mask.reshape(-1)
    counted = counted.double().repeat(len(gate_logits))[:, None]
    chosen = F.one_hot(probabilities.topk(top_k).indices, num_experts).sum(1)
    return num_experts * ((chosen * counted).sum(0) * (probabilities * counted).sum(0)).sum() / counted.sum() ** 2


@contextmanager
def routers_in_float64() -> Iterator[None]:
    """Compute the router's softmax, the balance, and the loss in float64."""
    softmax = F.softmax

    def wide(given: Tensor, *args: Any, dtype: torch.dtype | None = None, **others: Any) -> Tensor:
        return softmax(given, *args, dtype=torch.float64 if dtype is torch.float32 else dtype, **others)

    with pytest.MonkeyPatch.context() as patched, all_in_float64():
        patched.setattr(F, "softmax", wide)
        for module in (modeling_mixtral, modeling_qwen3_moe):
            patched.setattr(module, "load_balancing_loss_func", balance_in_float64)
        yield


def errors_in_float64(model: nn.Module, rows: list[Row] = ROWS, **arguments: Any) -> list[float]:
    with routers_in_float64():
        return window_errors(model, rows, **arguments)


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", InexactLossWarning)
        yield


@pytest.mark.parametrize("name", MODELS)
def test_the_balance_in_float64_is_that_of_transformers(name: str) -> None:
    model, batch = moe(name), one_batch(ROWS)
    outputs = model(**batch)
    found = balance_in_float64(outputs.router_logits, EXPERTS, TOP_K, batch["attention_mask"])
    assert found.item() == pytest.approx(outputs.aux_loss.item(), rel=1e-6)


@pytest.mark.parametrize("size", some_slow([1, 2, 3, 9], (2,)))
@pytest.mark.parametrize("coefficient", some_slow([1.0, 1e-3], (1.0,)))
@pytest.mark.parametrize("name", MODELS)
def test_a_mixture_of_experts_is_exact_in_every_split(name: str, coefficient: float, size: int) -> None:
    (error,) = errors_in_float64(moe(name, coefficient), batch_size=size, **WHOLE)
    assert error < 1e-10


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_in_the_precision_of_transformers_the_error_is_that_of_float32(name: str) -> None:
    (error,) = window_errors(moe(name), ROWS, batch_size=2, **WHOLE)
    assert error < 1e-6


WAYS: dict[str, dict[str, Any]] = {
    "remainder": {"batch_size": 2, "gradient_accumulation_steps": 3},
    "planner": {"batch_size": 2, "gradient_accumulation_steps": 3, "planner": True},
    "max_tokens": {"batch_size": 4, "effective_batch_size": 9, "max_tokens": 24},
    "padding_free": {"batch_size": 2, "effective_batch_size": 9, "padding_free": True},
    "gradient_checkpointing": {"batch_size": 2, "effective_batch_size": 9, "gradient_checkpointing": True},
    "accumulate_in_fp32": {"batch_size": 2, "effective_batch_size": 9, "accumulate_in_fp32": True},
}


@pytest.mark.parametrize("way", some_slow(list(WAYS), ("planner", "padding_free")))
def test_a_mixture_of_experts_is_exact_in_every_way_to_run_it(way: str) -> None:
    arguments = {"planner": False, "on_inexact": "error", "audit": False} | WAYS[way]
    errors = errors_in_float64(moe(), **arguments)
    assert len(errors) == (2 if "gradient_accumulation_steps" in arguments else 1)
    assert max(errors) < (1e-6 if way == "accumulate_in_fp32" else 1e-10)


@pytest.mark.slow
def test_adapters_of_a_mixture_of_experts_are_exact() -> None:
    model = peft.get_peft_model(
        moe(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).double()
    (error,) = errors_in_float64(model, batch_size=2, **WHOLE)
    assert error < 1e-10


@pytest.mark.slow
def test_in_bfloat16_the_error_is_that_of_one_batch_in_bfloat16() -> None:
    """Rounding to 16 bits moves the gradient of one batch itself; accumulating adds about as much."""
    narrow = moe().bfloat16()
    wide = copy.deepcopy(narrow).double()
    with routers_in_float64():
        wanted = one_batch_gradient(wide, ROWS)
    one = {name: g.double() for name, g in one_batch_gradient(narrow, ROWS).items()}
    (found,) = accumulated_gradients(narrow, ROWS, batch_size=2, accumulate_in_fp32=True, **WHOLE)
    assert 1e-3 < relative_error(one, wanted) < 0.05
    assert relative_error(found, wanted) < 1.5 * relative_error(one, wanted)


class Passes:
    """The forward passes of a model, with the random state that each started from."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[tuple[bool, Tensor, dict[str, Any]]] = []
        model.register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, _: nn.Module, __: Any, batch: dict[str, Any]) -> None:
        kept = {name: v.clone() if isinstance(v, Tensor) else v for name, v in batch.items()}
        self.seen.append((torch.is_grad_enabled(), torch.get_rng_state(), kept))


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_with_dropout_the_gradient_is_that_of_one_graph_with_the_same_draws(checkpointing: bool) -> None:
    model = moe(attention_dropout=0.3)
    passes = Passes(model)
    with routers_in_float64():
        (found,) = accumulated_gradients(
            model, ROWS, batch_size=2, gradient_checkpointing=checkpointing, loss_head="full", **WHOLE
        )  # passes at labelled positions get no labels
        k = 5
        first, second = passes.seen[-2 * k : -k], passes.seen[-k:]
        assert [grad for grad, *_ in [*first, *second]] == [False] * k + [True] * k
        assert all(torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
        wanted = _of_one_graph(moe(attention_dropout=0.3), [(state, batch) for _, state, batch in second])
    assert relative_error(found, wanted) < 1e-10


def _of_one_graph(model: nn.Module, passes: list[tuple[Tensor, dict[str, Any]]]) -> dict[str, Tensor]:
    """Return the gradient of all micro-batches in one graph, each with the random numbers that it drew."""
    model.train()
    outputs = []
    for state, batch in passes:
        torch.set_rng_state(state)
        outputs.append(model(**batch))
    logits = torch.cat([o.logits[:, :-1].flatten(0, 1) for o in outputs])
    labels = torch.cat([batch["labels"][:, 1:].flatten() for _, batch in passes])
    masks = torch.cat([batch["attention_mask"].flatten() for _, batch in passes])
    routers = [torch.cat(layer) for layer in zip(*(o.router_logits for o in outputs), strict=True)]
    balance = balance_in_float64(routers, EXPERTS, TOP_K, masks)
    (F.cross_entropy(logits, labels, ignore_index=IGNORED) + balance).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def grads_of_passes(model: nn.Module, **arguments: Any) -> list[bool]:
    """Return for each forward pass of an update of three rows per micro-batch whether it had a gradient."""
    passes = Passes(model)
    accumulated_gradients(model, ROWS, **{"batch_size": 3} | WHOLE | arguments)
    last = passes.seen[-1][2]["input_ids"].shape[0]
    return [grad for grad, _, batch in passes.seen[-6:] if len(batch["input_ids"]) == last]


def test_a_coefficient_of_zero_leaves_out_the_first_pass() -> None:
    assert grads_of_passes(moe(coefficient=0.0)) == [True] * 3


@pytest.mark.slow
def test_a_window_runs_each_micro_batch_twice_unless_it_is_the_only_one() -> None:
    assert grads_of_passes(moe()) == [False] * 3 + [True] * 3
    assert grads_of_passes(moe(), batch_size=9) == [True]


class InTrainModeOnly(MixtralForCausalLM):
    """A mixture of experts that returns neither routers nor balance in eval mode."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> Any:  # type: ignore[override]
        return super().forward(input_ids, attention_mask, labels=labels, output_router_logits=self.training)


@pytest.mark.slow
def test_a_model_that_returns_its_routers_in_train_mode_only_is_exact() -> None:
    model = moe()
    model.__class__ = InTrainModeOnly
    assert model.eval()(**one_batch(ROWS)).router_logits is None
    (error,) = errors_in_float64(model, batch_size=2, **WHOLE)
    assert error < 1e-10


def test_a_model_without_routers_in_eval_mode_is_evaluated_without_its_balance() -> None:
    model = moe()
    model.__class__ = InTrainModeOnly
    result = test_fine_tuning(
        model, train_data=ROWS, val_data=ROWS, n_epochs=1, batch_size=2, effective_batch_size=9, learning_rate=1e-12,
        verbosity="quiet", audit=False,
    )  # fmt: skip
    wanted = model.eval()(**one_batch(ROWS)).loss.item()  # its own loss in eval mode, which has no balance
    assert result.val_loss_history == [pytest.approx(wanted, rel=1e-6)]


class OfUnknownFormula(MixtralForCausalLM):
    """A mixture of experts whose balance is the squared coefficient of variation of the experts' probabilities."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> Any:  # type: ignore[override]
        outputs = super().forward(input_ids, attention_mask, labels=labels)
        mean = torch.cat(outputs.router_logits).softmax(-1).mean(0)
        balance = mean.var() / mean.mean() ** 2
        outputs.loss = outputs.loss - self.router_aux_loss_coef * (outputs.aux_loss - balance)
        outputs.aux_loss = balance
        return outputs


def test_a_balance_of_unknown_formula_is_that_of_micro_batches_with_a_warning() -> None:
    model = moe()
    model.__class__ = OfUnknownFormula
    with pytest.warns(InexactLossWarning, match="'aux_loss', .*% of the loss, depends on the rows of a batch together"):
        grads = grads_of_passes(model, on_inexact="warn")
    assert grads == [True] * 3


def test_only_probabilities_are_compared_between_passes() -> None:
    """On a GPU, rounding can decide which of two experts a token chooses."""
    values = dict.fromkeys(("aux_loss.choices_E", "aux_loss.probabilities_E", "aux_loss.n_tokens"), torch.ones(2))
    assert RouterTerms([], torch.device("cpu")).compared(values).keys() == {"aux_loss.probabilities_E"}
