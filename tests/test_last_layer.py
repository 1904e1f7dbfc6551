"""The last layer at the positions that are read: the gradient of all positions, and all of them where the loss does."""

import copy
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertForSequenceClassification, BertModel

from exactness import accumulated_gradients, window_errors
from ftaccum import test_fine_tuning
from ftaccum.objective.last_layer import LastLayer
from ftaccum.runtime.log import logger
from heads import HEADS, Row, all_in_float64, one_batch, relative_error
from training_passes import is_training_pass

COMPILES_FLOAT64 = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="older torch compiles no attention in float64 with a mask"
)
BERT, LLAMA = HEADS["sequence classification, BERT"], HEADS["sequence classification, Llama"]
SIZES: dict[str, Any] = {"batch_size": 2, "effective_batch_size": 5, "audit": False, "verbosity": "debug"}
SHORT_WAY, ROUNDING = "only at the positions that are read.", 1e-12
KEYS_VALUES = re.compile("key|value|k_proj|v_proj")
LAZY = [
    *("sequence classification, BERT", "sequence classification, RoBERTa", "sequence classification, DistilBERT"),
    *("sequence classification, Llama", "regression, BERT", "multi-label, BERT", "multiple choice, BERT"),
    "image classification, ViT",
]
WHOLE = {
    "sequence classification, GPT-2": "all of its positions are read",  # its layers join rows and positions
    "question answering, BERT": "all of its positions are read",
    "token classification, BERT": "each token has a label",
}


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        before, found, text = record.getMessage().partition("The last layer is computed ")
        if found and not before:
            self.found.append(text)


@contextmanager
def choices() -> Iterator[list[str]]:
    """Collect what runs say about the positions of their last layer. They must have `verbosity="debug"`."""
    messages = _Messages()
    logger.addHandler(messages)
    try:
        yield messages.found
    finally:
        logger.removeHandler(messages)


def choice(model: nn.Module, rows: list[Row], **arguments: Any) -> str:
    with choices() as found:
        accumulated_gradients(model, rows, **SIZES | arguments)
    return "".join(found)


def last_layer(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))[-1]


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            one, other = args[-2:]
            self.n += one.shape[0] * one.shape[1] * other.shape[1]
        return function(*args, **kwargs or {})


def products(model: nn.Module, batch: Any) -> int:
    """Return the multiplications of matrix products in a forward and a backward pass."""
    with Products() as counted:
        model(**batch).loss.backward()
    return counted.n


@pytest.mark.parametrize("name", LAZY)
def test_gradients_equal_one_batch(name: str) -> None:
    with all_in_float64(), choices() as found:
        errors = window_errors(HEADS[name].model(), HEADS[name].rows(), **SIZES)
    assert found == [SHORT_WAY]
    assert max(errors) < ROUNDING


@pytest.mark.parametrize("name", WHOLE)
def test_layers_that_are_read_everywhere_are_computed_everywhere(name: str) -> None:
    assert choice(HEADS[name].model(), HEADS[name].rows()) == f"at all positions: {WHOLE[name]}."


@pytest.mark.parametrize("name", ["sequence classification, BERT", "sequence classification, Llama"])
def test_only_keys_and_values_are_computed_for_positions_that_are_not_read(name: str) -> None:
    model, batch = HEADS[name].model(), one_batch(HEADS[name].rows(4))
    whole = products(model, batch)
    with LastLayer(model, last_layer(model)).lazily():
        lazy = products(model, batch)
    weights = [
        m for n, m in last_layer(model).named_modules() if isinstance(m, nn.Linear) and not KEYS_VALUES.search(n)
    ]
    weights += [model.score] if hasattr(model, "score") else []
    n_rows, length = batch["input_ids"].shape
    saved = n_rows * (length - 1) * sum(module.weight.numel() for module in weights)
    assert whole - lazy == 3 * saved  # forward, gradient of the input, gradient of the weight


def test_losses_with_dropout_have_the_same_distribution() -> None:
    config = copy.deepcopy(BERT.config)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.3
    torch.manual_seed(0)
    model, batch = BertForSequenceClassification(config).train(), one_batch(BERT.rows(256))

    def losses() -> Tensor:
        return torch.stack([F.cross_entropy(model(**inputs).logits, labels, reduction="none") for _ in range(4)])

    labels, inputs = batch["labels"], {name: value for name, value in batch.items() if name != "labels"}
    whole = losses()
    with LastLayer(model, last_layer(model)).lazily():
        lazy = losses()
    error = ((whole.var() + lazy.var()) / whole.numel()).sqrt()
    assert abs(whole.mean() - lazy.mean()) < 4 * error
    assert 0.8 < whole.var() / lazy.var() < 1.25


def both_ways(model: nn.Module, rows: list[Row], **arguments: Any) -> list[float]:
    """Return the differences of the windows' gradients between a lazy and a whole last layer."""
    found = []
    for loss_head in ("auto", "full"):
        with all_in_float64(), choices() as said:
            given = SIZES | {"loss_head": loss_head} | arguments
            found.append(accumulated_gradients(copy.deepcopy(model), rows, **given))
        assert said == ([SHORT_WAY] if loss_head == "auto" else [])
    return [relative_error(lazy, whole) for lazy, whole in zip(*found, strict=True)]


def adapted() -> nn.Module:
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=3, init_lora_weights=False, target_modules=["query", "value"])
    return peft.get_peft_model(BERT.model(), lora).double()


def eager() -> nn.Module:
    model = LLAMA.model()
    model.set_attn_implementation("eager")
    return model


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # of older peft
@pytest.mark.parametrize(("model", "arguments"), [(adapted, {}), (eager, {}), (BERT.model, {"label_smoothing": 0.1})])
def test_gradients_equal_those_of_a_whole_layer(model: Callable[[], nn.Module], arguments: dict[str, Any]) -> None:
    assert max(both_ways(model(), BERT.rows(), **arguments)) < ROUNDING


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="older torch does not autocast float64 weights")
def test_autocast_rounds_as_with_a_whole_layer() -> None:
    assert max(both_ways(BERT.model().float(), BERT.rows(), mixed_precision="bf16")) < 1e-2


class Encoder(nn.Module):
    """An encoder whose first hidden states are the logits, with or without the others among the outputs."""

    def __init__(self, *, gives_hidden: bool) -> None:
        super().__init__()
        self.bert = BertModel(copy.deepcopy(BERT.config), add_pooling_layer=False)
        self.gives_hidden = gives_hidden

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        hidden = self.bert(input_ids, attention_mask).last_hidden_state
        return {"logits": hidden[:, 0]} | ({"hidden": hidden} if self.gives_hidden else {})


def encoder(*, gives_hidden: bool) -> nn.Module:
    torch.manual_seed(0)
    return Encoder(gives_hidden=gives_hidden).double()


def of_logits(outputs: Any, batch: Any) -> Tensor:
    return F.cross_entropy(outputs["logits"], batch["labels"])


def test_a_model_that_returns_all_hidden_states_reads_all_positions() -> None:
    assert max(both_ways(encoder(gives_hidden=False), BERT.rows(), loss_fn=of_logits)) < ROUNDING
    said = choice(encoder(gives_hidden=True), BERT.rows(), loss_fn=of_logits)
    assert said == "at all positions: all of its positions are read."


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor) -> Tensor:  # noqa: ARG004
        return 2 * given

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return 2 * gradient


def changed(change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a model with a change of the hidden states in its last layer."""
    model = BERT.model()
    dense = last_layer(model).intermediate.dense
    run = dense.forward
    dense.forward = lambda hidden: run(change(hidden))
    return model


CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a function of autograd": (Doubled.apply, "at all positions: the model fails with a lazy last layer: `mul` runs"),
    "an operation in place": (
        lambda hidden: hidden.mul_(2),
        "at all positions: the model fails with a lazy last layer",
    ),
    "a function without a rule": (lambda hidden: hidden.cumsum(-1), "at all positions: all of its positions are read"),
    "a mean over positions": (lambda hidden: hidden + hidden.mean(1, keepdim=True), SHORT_WAY),
}


@pytest.mark.parametrize("name", CHANGES)
def test_layers_of_other_kinds_stay_exact(name: str) -> None:
    change, expected = CHANGES[name]
    with all_in_float64(), choices() as found:
        errors = window_errors(changed(change), BERT.rows(), **SIZES, on_inexact="ignore")
    assert found[0].startswith(expected)
    assert max(errors) < ROUNDING


def test_a_pass_that_differs_from_those_before_training_is_run_with_a_whole_layer() -> None:
    seen = []

    def sometimes(hidden: Tensor) -> Tensor:
        if is_training_pass():
            seen.append(1)
            return hidden.mul_(1) if len(seen) % 3 == 0 else hidden
        return hidden

    with all_in_float64(), choices() as found:
        errors = window_errors(changed(sometimes), BERT.rows(), **SIZES)
    assert found[0] == SHORT_WAY
    assert any(text.startswith("at all positions in one window") for text in found)
    assert max(errors) < ROUNDING


class Counting(nn.Module):
    """Counts its passes, moves a buffer, changes its batch, and fails with lazy hidden states in every third pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = BERT.model()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.n_passes = 0
        dense = last_layer(self.inner).intermediate.dense
        run = dense.forward
        dense.forward = lambda hidden: run(hidden.mul_(1) if self.n_passes % 3 == 2 else hidden)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        outputs = self.inner(input_ids.clamp_(max=self.inner.config.vocab_size - 2) + 1, attention_mask, labels=labels)
        if self.training and torch.is_grad_enabled():
            self.n_passes += 1
            self.mean.mul_(0.5).add_(outputs.logits.detach().mean())
        return outputs


def test_a_window_that_is_repeated_leaves_the_state_of_one_pass() -> None:
    states = []
    for loss_head in ("auto", "full"):
        model = Counting()
        with all_in_float64(), choices() as found:
            gradients = accumulated_gradients(
                model, BERT.rows(), **SIZES | {"loss_head": loss_head, "on_inexact": "ignore"}
            )
        states.append((model.n_passes, model.mean.item(), gradients))
        assert any("in one window" in text for text in found) == (loss_head == "auto")
    assert states[0][0] == states[1][0]
    assert states[0][1] == pytest.approx(states[1][1], rel=1e-12)
    assert max(map(relative_error, states[0][2], states[1][2])) < ROUNDING


@pytest.mark.processes
@pytest.mark.slow
def test_all_processes_repeat_a_window_that_fails_on_one(two_processes: Callable[..., str]) -> None:
    printed = two_processes("lazy_of_two.py")
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("FOUND "))[6:])
    (_, one), (_, other) = found
    assert len(one) == len(other) >= 2
    assert set(one) == {"a pass of another process failed"}
    assert all("in place" in error for error in other)
    assert max(error for error, _ in found) < ROUNDING


def test_hidden_states_that_a_model_keeps_are_whole() -> None:
    model = BERT.model()
    dense = last_layer(model).intermediate.dense
    run = dense.forward

    def keeping(hidden: Tensor) -> Tensor:
        if is_training_pass():
            model.kept = hidden.detach()
        return run(hidden)

    dense.forward = keeping
    with all_in_float64(), choices() as found:
        errors = window_errors(model, BERT.rows(), **SIZES)
    assert found[0] == SHORT_WAY
    assert max(errors) < ROUNDING
    assert model.kept.norm().item() > 0


def test_hooks_in_the_layer_see_all_positions() -> None:
    model, lengths = BERT.model(), []
    hook = lambda _, __, output: lengths.append(output.shape[1])
    last_layer(model).output.register_forward_hook(hook)
    said = choice(model, BERT.rows())
    assert said == "at all positions: the last layer has hooks, which may read all positions."
    assert lengths


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"gradient_checkpointing": True}, "at all positions: the layers are checkpointed."),
        ({"loss_head": "full"}, ""),
        pytest.param({"compile": True}, "", marks=[COMPILES_FLOAT64, pytest.mark.slow]),
    ],
)
def test_layers_are_whole_with(arguments: dict[str, Any], said: str) -> None:
    assert choice(LLAMA.model(), LLAMA.rows(), **arguments) == said


def test_evaluation_gives_the_same_losses() -> None:
    found = []
    for loss_head in ("auto", "full"):
        model = BERT.model()
        result = test_fine_tuning(
            model, train_data=BERT.rows(), val_data=BERT.rows(seed=3), batch_size=2, gradient_accumulation_steps=2,
            n_epochs=2, loss_head=loss_head, output_dir=None, verbosity="quiet",
        )  # fmt: skip
        found.append([result.initial_loss, *result.val_loss_history])
    assert found[0] == pytest.approx(found[1], rel=1e-10)
