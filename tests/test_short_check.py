"""The short self-check of runs with audits: it finds what the whole one finds, or leaves the loss to that."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer

from exactness import window_errors
from ftaccum import InexactLossWarning, SettingsError, test_fine_tuning
from ftaccum.objective import self_check
from ftaccum.training import build_objective
from heads import HEADS, IGNORED, Row, all_in_float64, one_batch
from test_labelled_head import LLAMA, tiny

RARE = 50  # a label
ONCE: dict[str, Any] = {"batch_size": 2, "gradient_accumulation_steps": 2, "validation_split": 0.0, "n_epochs": 1}


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Collect the report of the short check, which may be None, and that of the run."""
    found: dict[str, Any] = {}

    def short(*arguments: Any, real: Any = self_check.found_in_losses) -> Any:
        found["short"] = real(*arguments)
        return found["short"]

    def measured(*arguments: Any, real: Any = build_objective.measured_objective, **named: Any) -> Any:
        objective = real(*arguments, **named)
        found["run"] = objective.report
        return objective

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_check, "found_in_losses", short)
        patch.setattr(build_objective, "measured_objective", measured)
        yield found


def reports(model: nn.Module, rows: list[Row], **arguments: Any) -> dict[str, Any]:
    with watched() as found:
        given = ONCE | {"max_updates": 1, "progress": False, "self_check_cache": False} | arguments
        test_fine_tuning(model, train_data=rows, **given)
    return found


@pytest.mark.parametrize("name", HEADS)
def test_it_finds_the_count_that_the_whole_check_finds(name: str) -> None:
    if name == "seq2seq, BART" and not hasattr(Trainer, "loss_is_scaled_for_ga"):
        pytest.skip("the short check leaves BART of older Transformers to the whole check")
    model, rows = HEADS[name].model(), HEADS[name].rows()
    found, whole = reports(model, rows), reports(model, rows, audit=False)
    assert "short" not in whole
    if name.startswith("question answering"):  # its loss has two terms
        assert found["short"] is None
    else:
        assert found["short"].ways == found["run"].ways == whole["run"].ways


class Changed(LlamaForCausalLM):
    """A model that changes its own loss."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        if labels is not None:
            outputs["loss"] = self.changed(outputs["loss"], outputs.logits, labels)
        return outputs

    def changed(self, loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError


class Counting(Changed):
    passes = 0

    def changed(self, loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002
        self.passes += 1
        return loss * (1 + self.passes / 10)


class Drawing(Changed):
    def changed(self, loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002
        return loss * (1 + torch.rand(()) / 10) if self.training else loss


class MovingBuffer(Changed):
    def changed(self, loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002
        self.model.rotary_emb.inv_freq += 1e-9 * self.training
        return loss


class Detached(Changed):
    def changed(self, loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002
        return loss.detach()


class MixingRows(Changed):
    def changed(self, loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002
        return loss + logits[:, 0].std(0).mean() if len(logits) > 1 else loss


class InPlace(Changed):
    def changed(self, loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        exp = logits.exp()
        loss = F.cross_entropy(exp[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        exp.add_(1)
        return loss


class IgnoringOne(Changed):
    """Ignores a label that only one row has."""

    def changed(self, loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002
        targets = labels[:, 1:].flatten()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.masked_fill(targets == RARE, IGNORED))


class MovedLoss(Changed):
    """Names its loss only in train mode."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        outputs = LlamaForCausalLM.forward(self, input_ids, attention_mask, labels=labels)
        return outputs if self.training else (outputs.logits.mean(), outputs.logits, outputs.get("loss"))


class UnequalGradient(torch.autograd.Function):
    """Multiplies a gradient by the number of rows."""

    @staticmethod
    def forward(context: Any, loss: Tensor, logits: Tensor) -> Tensor:
        context.n_rows = len(logits)
        return loss.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        return gradient * context.n_rows, None


class WrongGradient(Changed):
    def changed(self, loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002
        return UnequalGradient.apply(loss, logits)


def of_llama(model_class: type[Changed], **arguments: Any) -> dict[str, Any]:
    return reports(tiny(model_class), LLAMA.rows(), **arguments)


@pytest.mark.parametrize("model_class", [Drawing, MovingBuffer])
def test_it_leaves_models_that_change_something_in_train_mode_to_the_whole_check(model_class: type[Changed]) -> None:
    found = of_llama(model_class)
    assert found["short"] is None
    assert not found["run"].inexact()


@pytest.mark.parametrize(
    ("model_class", "words"),
    [
        (Counting, "A forward pass changes `passes` of Counting"),
        (MixingRows, "The loss is not a mean over items that can be counted"),
    ],
)
def test_it_leaves_inexact_losses_to_the_whole_check(model_class: type[Changed], words: str) -> None:
    with pytest.warns(InexactLossWarning, match=words):
        assert of_llama(model_class)["short"] is None


@pytest.mark.parametrize(
    ("model_class", "words"),
    [
        (Detached, "The loss does not depend on any trainable parameter"),
        (InPlace, "The backward pass of the loss fails"),
        (MovedLoss, "it is unclear which of them is the loss"),
    ],
)
def test_losses_without_a_gradient_are_refused_before_training(model_class: type[Changed], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        of_llama(model_class)


def test_it_looks_at_rare_labels() -> None:
    rows = [row | {"labels": [label % RARE for label in row["labels"]]} for row in LLAMA.rows()]
    rows[-1]["labels"][1] = RARE
    assert reports(LLAMA.model(), rows)["short"] is not None
    found = reports(tiny(IgnoringOne), rows)
    assert found["short"] is None
    assert found["run"].own_rules


def test_it_leaves_a_router_s_balance_to_the_whole_check() -> None:
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
    found = reports(MixtralForCausalLM(MixtralConfig(**LLAMA.config.to_diff_dict() | sizes)), LLAMA.rows())
    assert found["short"] is None
    assert found["run"].parts == ("aux_loss",)


def test_hooks_on_gradients_are_left_to_the_whole_check() -> None:
    model = LLAMA.model()
    next(model.parameters()).register_post_accumulate_grad_hook(lambda _: None)
    with pytest.warns(InexactLossWarning, match="Hooks on"):
        assert reports(model, LLAMA.rows())["short"] is None


def test_the_audit_of_the_first_update_finds_a_wrong_gradient() -> None:
    with pytest.warns(InexactLossWarning, match="Audit of update 1: the accumulated gradient .* differs by"):
        assert of_llama(WrongGradient)["short"] is not None
    with pytest.warns(InexactLossWarning, match="The gradient over separate micro-batches"):
        of_llama(WrongGradient, audit=False)


@pytest.mark.parametrize(
    "name", ["causal LM, Llama", "masked LM, BERT", "seq2seq, T5", "sequence classification, BERT"]
)
def test_gradients_of_audited_runs_equal_one_batch(name: str) -> None:
    rows = HEADS[name].rows()
    with all_in_float64(), watched() as found:
        errors = window_errors(HEADS[name].model(), rows, batch_size=2, effective_batch_size=5, self_check_cache=False)
    assert found["short"] is not None
    assert max(errors) < 1e-12


class MasksFew:
    """Collates rows for a masked language model. Some of them get no label, and others in the next batch."""

    def __init__(self) -> None:
        self.draw = torch.Generator().manual_seed(0)

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        batch = one_batch(rows)
        hides = torch.rand(batch["labels"].shape, generator=self.draw) > 0.1
        return batch | {"labels": batch["labels"].masked_fill(hides, IGNORED)}


def test_rows_without_labels_are_no_obstacle() -> None:
    model, rows = HEADS["masked LM, BERT"].model(), HEADS["masked LM, BERT"].rows() * 4
    rows = [row | {"labels": row["input_ids"]} for row in rows]
    assert reports(model, rows, data_collator=MasksFew())["short"] is not None
