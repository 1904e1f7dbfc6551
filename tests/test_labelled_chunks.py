"""The loss of many labelled positions in chunks, and all logits where a model changes those of its head."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, TrainerCallback
from transformers.modeling_outputs import CausalLMOutput

from exactness import window_errors
from ftaccum.objective import chunked_loss
from ftaccum.objective.chunked_loss import ChunkedLoss
from heads import HEADS, VOCABULARY, Row, all_in_float64
from test_labelled_head import LLAMA, SIZES, adapted, both_ways, tiny
from training_passes import is_training_pass

_BYTES = 4 * VOCABULARY * 2  # of the logits of two positions


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Make chunks of two positions, and collect whether each call computes the loss in chunks."""
    compute = ChunkedLoss.__call__
    calls: list[bool] = []

    def watched(*arguments: Any) -> Tensor | None:
        loss = compute(*arguments)
        if is_training_pass():
            calls.append(loss is not None)
        return loss

    monkeypatch.setattr(chunked_loss, "_POSITIONS", 2)
    monkeypatch.setattr(chunked_loss, "_BYTES", _BYTES)
    monkeypatch.setattr(ChunkedLoss, "__call__", watched)
    return calls


def errors(model: nn.Module, rows: list[Row]) -> float:
    with all_in_float64():
        return max(window_errors(model, rows, **SIZES))


@pytest.mark.parametrize("name", ["masked LM, BERT", "causal LM, Llama", "causal LM, GPT-2", "seq2seq, T5"])
def test_gradients_in_chunks_equal_those_of_one_batch(name: str, chunked: list[bool]) -> None:
    assert errors(HEADS[name].model(), HEADS[name].rows()) < 1e-12
    assert any(chunked)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # of older peft
@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=["an adapter of the head", "a trained head beside adapters"],
)
def test_gradients_in_chunks_equal_those_of_all_positions_with(options: dict[str, Any], chunked: list[bool]) -> None:
    assert max(both_ways(adapted(**options), LLAMA.rows())) < 1e-12
    assert any(chunked)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # of older peft
@pytest.mark.parametrize("checkpoints", [False, True])
def test_chunks_are_smaller_with_gradient_checkpointing(
    checkpoints: bool, chunked: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_loss, "_BYTES", 2**20)
    monkeypatch.setattr(chunked_loss, "_BYTES_WITH_CHECKPOINTS", _BYTES)
    model = adapted(target_modules=["q_proj", "lm_head"])  # torch's own chunks need a plain linear layer
    assert max(both_ways(model, LLAMA.rows(), gradient_checkpointing=checkpoints)) < 1e-12
    assert any(chunked) is checkpoints


class Changing(LlamaForCausalLM):
    """Changes the outputs of its head."""

    def logits_of(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden).mul_(0.5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.logits_of(self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


class Clamping(Changing):
    """Clamps logits that are larger than those of the weights before training."""

    def logits_of(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden).clamp(-30, 30)


class Options(Changing):
    """Gives its head an option."""

    def logits_of(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden, scale=0.5)


class Scaled(nn.Linear):
    def forward(self, hidden: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(hidden) * scale


@pytest.mark.parametrize("model_class", [Changing, Clamping, Options])
def test_logits_are_not_computed_in_chunks_if_the_model_changes_them_by(model_class: type, chunked: list[bool]) -> None:
    model: Any = tiny(model_class)
    model.lm_head.__class__ = Scaled if model_class is Options else nn.Linear
    assert errors(model, LLAMA.rows()) < 1e-12
    assert not any(chunked)


class Halving(TrainerCallback):
    """Registers a hook that changes logits, after the checks before training."""

    def __init__(self, module: str) -> None:
        self._module = module

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        model.get_submodule(self._module).register_forward_hook(lambda _, __, logits: 0.5 * logits)


@pytest.mark.parametrize(("name", "module"), [("causal LM, Llama", "lm_head"), ("masked LM, BERT", "cls")])
def test_hooks_change_the_logits_of_labelled_positions(name: str, module: str, chunked: list[bool]) -> None:
    assert max(both_ways(HEADS[name].model(), HEADS[name].rows(), callbacks=[Halving(module)])) < 1e-12
    assert not any(chunked)


def test_logits_are_not_computed_in_chunks_if_a_hook_changes_the_inputs_of_the_head(chunked: list[bool]) -> None:
    model: Any = tiny(LlamaForCausalLM)
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (0.5 * inputs[0],))
    assert errors(model, LLAMA.rows()) < 1e-12
    assert not any(chunked)


def test_chunks_run_a_head_whose_forward_was_replaced(chunked: list[bool]) -> None:
    model: Any = tiny(LlamaForCausalLM)
    model.lm_head.forward = lambda hidden: 0.5 * F.linear(hidden, model.lm_head.weight)
    assert errors(model, LLAMA.rows()) < 1e-12
    assert any(chunked)


def test_logits_of_a_head_without_a_weight_are_not_computed_in_chunks(chunked: list[bool]) -> None:
    model: Any = tiny(LlamaForCausalLM)
    model.lm_head = nn.Sequential(model.lm_head)
    assert errors(model, LLAMA.rows()) < 1e-12
    assert not any(chunked)


class ByDimensions(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) * (0.5 if hidden.ndim == 3 else 1.0)


def test_heads_get_as_many_dimensions_in_chunks(chunked: list[bool]) -> None:
    model: Any = tiny(LlamaForCausalLM)
    model.lm_head.__class__ = ByDimensions
    assert errors(model, LLAMA.rows()) < 1e-12
    assert any(chunked)
