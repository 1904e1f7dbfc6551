"""Logits at labelled positions only: the gradient of all logits, and the whole head where the loss reads more."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput

from exactness import accumulated_gradients, window_errors
from ftaccum import DataError
from heads import HEADS, IGNORED, PAD, Row, all_in_float64, relative_error
from labelled_heads import WithLoss, choices_of_head, record_positions

BERT, LLAMA, GPT2 = HEADS["masked LM, BERT"], HEADS["causal LM, Llama"], HEADS["causal LM, GPT-2"]
MASKED, CAUSAL, T5, BART = "masked LM, BERT", "causal LM, Llama", "seq2seq, T5", "seq2seq, BART"
SIZES: dict[str, Any] = {"batch_size": 2, "effective_batch_size": 5, "audit": False, "verbosity": "debug"}
SHORT_WAY = "labelled positions only."
ROUNDING = 1e-12


def n_labels(rows: list[Row], *, shifts: bool) -> int:
    return sum(label != IGNORED for row in rows for label in row["labels"][int(shifts) :])


def choice(model: nn.Module, rows: list[Row], **arguments: Any) -> str:
    """Return the positions at which a run computes logits, and the reason, as it logs them."""
    with choices_of_head() as choices:
        accumulated_gradients(model, rows, **SIZES | arguments)
    (chosen,) = choices
    return chosen


@pytest.mark.parametrize("name", [MASKED, CAUSAL, "causal LM, GPT-2", T5, BART])
def test_the_output_embedding_sees_only_positions_with_a_label(name: str) -> None:
    model, rows = HEADS[name].model(), HEADS[name].rows()
    seen = record_positions(model)
    assert choice(model, rows) == SHORT_WAY
    assert sum(seen) == n_labels(rows, shifts="causal" in name)


def test_the_full_head_sees_all_positions() -> None:
    model, rows = BERT.model(), BERT.rows()
    seen = record_positions(model)
    accumulated_gradients(model, rows, **SIZES | {"loss_head": "full"})
    assert sum(seen) >= sum(len(row["labels"]) for row in rows)


def unlabelled(rows: list[Row], places: range) -> list[Row]:
    return [row | {"labels": [IGNORED] * len(row["labels"])} if n in places else row for n, row in enumerate(rows)]


def head_with(model_class: type, config: Any) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return model_class(copy.deepcopy(config)).double()

    return model


_SMALL: dict[str, Any] = LLAMA.config.to_diff_dict() | {"architectures": None}
_SMALL.pop("model_type", None)
_SMALL |= {"head_dim": 8, "initializer_range": 0.5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
SCALED = {
    "tied weights": head_with(LlamaForCausalLM, LLAMA.config.__class__(**_SMALL | {"tie_word_embeddings": True})),
    "soft cap": head_with(
        Gemma2ForCausalLM, Gemma2Config(**_SMALL, final_logit_softcapping=1.5, query_pre_attn_scalar=8)
    ),
}


@pytest.mark.parametrize("name", SCALED)
def test_soft_caps_and_tied_weights_apply_to_the_labelled_positions(name: str) -> None:
    rows = LLAMA.rows()
    with all_in_float64(), choices_of_head() as choices:
        errors = window_errors(SCALED[name](), rows, **SIZES)
    assert choices == [SHORT_WAY]
    assert max(errors) < 1e-10


@pytest.mark.parametrize("name", [MASKED, CAUSAL, T5, BART])
def test_gradients_equal_those_of_one_batch_also_where_micro_batches_have_no_label(name: str) -> None:
    rows = HEADS[name].rows(14)
    rows = unlabelled(rows, range(5, 8)) if name in (MASKED, CAUSAL) else rows
    with all_in_float64(), choices_of_head() as choices:
        errors = window_errors(HEADS[name].model(), rows, **SIZES | {"batch_size": 1, "planner": False})
    assert choices == [SHORT_WAY]
    assert max(errors) < 1e-10


def both_ways(model: nn.Module, rows: list[Row], **arguments: Any) -> list[float]:
    """Return the differences of the windows' gradients between labelled and all positions. Models draw equally."""
    found = []
    for loss_head in ("auto", "full"):
        with all_in_float64(), choices_of_head() as choices:
            torch.manual_seed(0)
            found.append(
                accumulated_gradients(copy.deepcopy(model), rows, **SIZES | {"loss_head": loss_head} | arguments)
            )
        assert choices == ([SHORT_WAY] if loss_head == "auto" else [])
    return [relative_error(short, full) for short, full in zip(*found, strict=True)]


def with_dropout() -> nn.Module:
    torch.manual_seed(0)
    config = copy.deepcopy(BERT.config)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.2
    return BertForMaskedLM(config).double()


def balanced() -> nn.Module:
    """Return a mixture of experts whose loss adds the balance of its router."""
    config = MixtralConfig(
        **_SMALL, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.1
    )
    config._experts_implementation = "eager"  # the only one for float64
    return head_with(MixtralForCausalLM, config)()


def adapted(**options: Any) -> nn.Module:
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=3, init_lora_weights=False, **options)
    return peft.get_peft_model(LLAMA.model(), lora).double()


WAYS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "dropout": (with_dropout, {}),
    "gradient checkpointing": (LLAMA.model, {"gradient_checkpointing": True}),
    "without padding": (LLAMA.model, {"padding_free": True}),
    "a scale of logits": (head_with(CohereForCausalLM, CohereConfig(**_SMALL, logit_scale=0.3)), {}),
    "a balance of experts": (balanced, {"on_inexact": "ignore"}),
    "a balance of experts over the window": (balanced, {"router_balance": "window"}),
    "an adapter of the head": (lambda: adapted(target_modules=["q_proj", "lm_head"]), {}),
    "a trained head beside adapters": (lambda: adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]), {}),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # of older peft
@pytest.mark.parametrize("name", WAYS)
def test_gradients_equal_those_of_all_positions_with(name: str) -> None:
    model, arguments = WAYS[name]
    rows = (BERT if name == "dropout" else LLAMA).rows()
    assert max(both_ways(model(), rows, **arguments)) < ROUNDING


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="older torch does not autocast float64 weights")
def test_autocast_rounds_as_with_all_positions() -> None:
    model, rows = LLAMA.model().float(), LLAMA.rows()
    assert max(both_ways(model, rows, mixed_precision="bf16")) < 1e-2


class Smoothed(WithLoss, LlamaForCausalLM):
    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1)


class Normalized(WithLoss, LlamaForCausalLM):
    """Keeps the logarithm of the softmax's denominator near 0."""

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        counted = labels[:, 1:] != IGNORED
        z = logits[:, :-1][counted].logsumexp(-1)
        return F.cross_entropy(logits[:, :-1][counted], labels[:, 1:][counted]) + 1e-4 * z.pow(2).mean()


class Entropic(WithLoss, LlamaForCausalLM):
    """Reads the logits of all positions."""

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) - 1e-3 * entropy


class Cancelling(WithLoss, LlamaForCausalLM):
    """Has a term that is always 0 but has a gradient."""

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        counted = labels[:, 1:] != IGNORED
        z = logits[:, :-1][counted].logsumexp(-1).mean()
        return F.cross_entropy(logits[:, :-1][counted], labels[:, 1:][counted]) + 0.01 * (z - z.detach())


class Penalized(WithLoss, LlamaForCausalLM):
    """Starts with logits of 0, where a penalty of large logits has neither a value nor a gradient."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        nn.init.zeros_(self.lm_head.weight)

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        counted = labels[:, 1:] != IGNORED
        penalty = logits[:, :-1][counted].pow(2).mean()
        return F.cross_entropy(logits[:, :-1][counted], labels[:, 1:][counted]) + 0.1 * penalty


class Renames(WithLoss, LlamaForCausalLM):
    """Takes the label 2 for a 3."""

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        labels = labels.masked_fill(labels == 2, 3)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Functional(LlamaForCausalLM):
    """Applies its head as a function."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = F.linear(hidden, self.lm_head.weight)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


class Twice(WithLoss, LlamaForCausalLM):
    """Calls its head twice, the second time on reversed rows."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.lm_head(hidden) + self.lm_head(hidden.flip(1)).flip(1)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


class NeedsLabels(LlamaForCausalLM):
    """Hides the last labelled token, which needs the labels."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask & (labels != 5), labels=labels)


class DropsLogits(nn.Linear):
    """A head with dropout of its own, which draws fewer numbers for fewer positions."""

    def forward(self, hidden: Tensor) -> Tensor:
        return F.dropout(super().forward(hidden), 0.2, self.training)


def tiny(model_class: type) -> nn.Module:
    torch.manual_seed(0)
    return model_class(copy.deepcopy(LLAMA.config)).double()


def with_dropped_logits() -> nn.Module:
    model: Any = LLAMA.model()
    model.lm_head.__class__ = DropsLogits
    return model


def hooked(*path: str) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        built: Any = LLAMA.model()
        built.get_submodule(".".join(path)).register_forward_hook(lambda *_: None)
        return built

    return model


def cross_entropy(outputs: Any, batch: Any) -> Tensor:
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def summed(outputs: Any, batch: Any) -> Tensor:
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


def count(batch: Any) -> int:
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def prompted() -> nn.Module:
    tuned = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(LLAMA.model(), tuned).double()


FAILS = "the model fails with labelled positions only"
ALL: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "label smoothing": (lambda: tiny(Smoothed), {}, "the loss differs by"),
    "a regularizer of the softmax": (lambda: tiny(Normalized), {}, "the loss differs by"),
    "the entropy of all positions": (lambda: tiny(Entropic), {"on_inexact": "ignore"}, "the loss"),
    "a gradient without a value": (lambda: tiny(Cancelling), {}, "the gradient differs by"),
    "a penalty of large logits": (lambda: tiny(Penalized), {}, "the loss differs by"),
    "a functional head": (
        lambda: tiny(Functional),
        {},
        f"{FAILS}: The logits have the shape",
    ),
    "a head called twice": (lambda: tiny(Twice), {}, "the"),
    "labels as inputs": (
        lambda: tiny(NeedsLabels),
        {"on_inexact": "ignore"},
        "the model fails with labelled positions only",
    ),
    "dropout of logits": (with_dropped_logits, {}, "the gradient differs by"),
    "a hook on the model": (hooked(), {}, "the model or its output embedding has hooks"),
    "a hook on the head": (hooked("lm_head"), {}, "the model or its output embedding has hooks"),
    "a loss function": (LLAMA.model, {"loss_fn": cross_entropy}, "the loss is not the model's own"),
    "a sum": (LLAMA.model, {"loss_fn": summed, "reduction": "sum"}, "the loss is not the model's own"),
    "a count of items": (LLAMA.model, {"count_items": count}, "the loss is not a plain mean over labels"),
    "virtual tokens": (prompted, {}, FAILS),
}


@pytest.mark.parametrize("name", ALL)
def test_all_logits_are_computed_with(name: str) -> None:
    model, arguments, reason = ALL[name]
    assert choice(model(), LLAMA.rows(), **arguments).startswith(f"all positions: {reason}")


def test_all_logits_are_computed_if_the_loss_differs_on_a_rare_row_only() -> None:
    rows = [row | {"labels": [min(label, 20) for label in row["labels"]]} for row in LLAMA.rows(40)]
    assert choice(tiny(Renames), rows) == SHORT_WAY
    rows[33]["labels"][-1] = 2
    assert choice(tiny(Renames), rows).startswith("all positions: the loss differs by")


class Widens(LlamaForCausalLM):
    """Appends a position to single rows, and drops its logits."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        more = int(len(input_ids) == 1)
        ids, mask = F.pad(input_ids, (0, more)), F.pad(attention_mask, (0, more))
        outputs = super().forward(ids, mask, labels=None if labels is None else F.pad(labels, (0, more), value=IGNORED))
        return CausalLMOutput(outputs.loss, outputs.logits[:, : outputs.logits.shape[1] - more])


def test_a_selection_that_works_only_before_training_is_an_error() -> None:
    with pytest.raises(DataError, match=r"The logits have the shape .* Pass `loss_head='full'`"):
        accumulated_gradients(tiny(Widens), LLAMA.rows(60), **SIZES | {"batch_size": 1})
