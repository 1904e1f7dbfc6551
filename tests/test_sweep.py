"""A sample of the sweep over all heads (`scripts/sweep_heads.py`), and that the sweep can fail."""

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from transformers import BertForMaskedLM

from every_head import TASKS, Case, Verdict, cases, check
from ftaccum.objective.normalizer import LossNormalizer

# Every task, with common heads and heads that count, pad or pool in unusual ways.
SAMPLE = {
    "CAUSAL_LM": "LlamaForCausalLM MambaForCausalLM XLNetLMHeadModel",
    "MASKED_LM": "BertForMaskedLM ModernBertForMaskedLM",
    "SEQ_TO_SEQ_CAUSAL_LM": "T5ForConditionalGeneration MarianMTModel",
    "SEQUENCE_CLASSIFICATION": "BartForSequenceClassification MixtralForSequenceClassification",
    "TOKEN_CLASSIFICATION": "XLMRobertaForTokenClassification",
    "MULTIPLE_CHOICE": "AlbertForMultipleChoice",
    "QUESTION_ANSWERING": "XLNetForQuestionAnsweringSimple",
    "NEXT_SENTENCE_PREDICTION": "BertForNextSentencePrediction",
    "IMAGE_CLASSIFICATION": "SwinForImageClassification",
    "VIDEO_CLASSIFICATION": "VivitForVideoClassification",
    "AUDIO_CLASSIFICATION": "ASTForAudioClassification",
    "CTC": "Wav2Vec2BertForCTC",
    "SPEECH_SEQ_2_SEQ": "WhisperForConditionalGeneration",
    "IMAGE_TEXT_TO_TEXT": "LlavaForConditionalGeneration",
}
# Their batch norm mixes the rows of a micro-batch.
INEXACT = {
    "SEMANTIC_SEGMENTATION": "DPTForSemanticSegmentation",
    "IMAGE_CLASSIFICATION": "ResNetForImageClassification",
}
# Kinds of layers and of rows that `heads.HEADS` lacks, with a head of which padding matters.
UNUSUAL = (
    "ModernBertForMaskedLM", "MixtralForSequenceClassification", "XLNetForQuestionAnsweringSimple",
)  # fmt: skip
FAILED = ("SILENTLY WRONG", "crashed")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()


def _cases(task: str, name: str) -> list[Case]:
    return [case for case in cases(task, name) if case.model_class.__name__ == name]


@functools.cache
def _verdict(task: str, name: str) -> Verdict:
    return check(_cases(task, name)[0])


@pytest.fixture
def verdicts() -> list[Verdict]:
    return [_verdict(task, name) for task, names in SAMPLE.items() for name in names.split()]


@pytest.mark.slow
def test_the_sample_has_a_class_of_every_task(verdicts: list[Verdict]) -> None:
    assert {verdict.task for verdict in verdicts} | INEXACT.keys() == set(TASKS)


@pytest.mark.slow
def test_no_head_of_the_sample_is_silently_wrong(verdicts: list[Verdict]) -> None:
    assert [verdict for verdict in verdicts if verdict.kind in FAILED] == []


@pytest.mark.slow
def test_the_heads_of_the_sample_are_exact(verdicts: list[Verdict]) -> None:
    others = [verdict for verdict in verdicts if verdict.kind not in ("exact", "exact with a remedy")]
    assert len(others) <= 1, others


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_head_is_exact(name: str) -> None:
    (task,) = (task for task, names in SAMPLE.items() if name in names.split())
    assert _verdict(task, name).kind in ("exact", "exact with a remedy")


@pytest.mark.parametrize(("task", "name"), INEXACT.items())
@pytest.mark.slow
def test_batch_norm_in_train_mode_is_caught(task: str, name: str) -> None:
    assert check(_cases(task, name)[0]).kind == "caught"


@pytest.mark.parametrize(("balance", "kind"), [("window", "exact"), ("micro_batch", "caught")])
def test_a_router_loss_is_exact_over_the_window_and_caught_over_micro_batches(balance: str, kind: str) -> None:
    (case,) = [case for case in _cases("CAUSAL_LM", "Qwen3MoeForCausalLM") if case.variant == "router loss"]
    assert check(case, router_balance=balance).kind == kind


@pytest.mark.slow
def test_padding_that_matters_only_at_some_lengths_is_detected() -> None:
    (case,) = [c for c in cases("SEQUENCE_CLASSIFICATION", "CanineFor") if c.variant == "regression"]
    assert check(case).kind in ("exact with a remedy", "caught")


@pytest.mark.slow
def test_a_loss_that_is_a_sum_is_caught_and_exact_when_declared() -> None:
    (as_sum,) = [case for case in _cases("CTC", "Wav2Vec2BertForCTC") if case.variant == "sum"]
    verdict = check(as_sum)
    assert verdict.kind == "exact with a remedy"
    assert verdict.why.startswith("reduction='sum'")


def test_an_exact_head_passes_the_sweep(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep_heads", "--task", "MASKED_LM", "--only", "RemBertForMaskedLM"])
    assert _script("sweep_heads").main() == 0
    assert "| masked lm | 1 | 1 | 1 | 0 | 0 | 0 | 0 | 0 |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_denominator_that_divides_by_the_passes_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def divided_by_k(self: LossNormalizer, means: dict[str, torch.Tensor], counts: dict[str, float]) -> torch.Tensor:  # noqa: ARG001
        return sum(means.values(), torch.zeros(())) / self._n_divided_by

    monkeypatch.setattr(LossNormalizer, "contribution", divided_by_k)
    monkeypatch.setattr("ftaccum.training.audit.AuditHandler.before_update", lambda *_: None)  # an audit would find it
    monkeypatch.setattr(sys, "argv", ["sweep_heads", "--task", "MASKED_LM", "--only", "RemBertForMaskedLM"])
    assert _script("sweep_heads").main() == 1
    assert "SILENTLY WRONG: 1\n  masked_lm, RemBertForMaskedLM: the gradient is" in capsys.readouterr().out


def test_a_model_that_fails_only_in_training_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = _cases("MASKED_LM", "BertForMaskedLM")
    monkeypatch.setattr("every_head.checking.accumulated_gradients", lambda *_, **__: 1 / 0)
    verdict = check(case)
    assert (verdict.kind, verdict.why) == ("crashed", "ZeroDivisionError: division by zero")


def test_a_class_that_cannot_be_built_is_reported_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = _cases("MASKED_LM", "BertForMaskedLM")

    def draws(*_: object, **__: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(BertForMaskedLM, "forward", draws)
    verdict = check(case)
    assert (verdict.kind, verdict.error) == ("not buildable", None)


def _script(name: str) -> ModuleType:
    file = Path(__file__).parent.parent / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
