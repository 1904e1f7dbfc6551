"""Validation with logits at labelled positions only: the loss and the metrics of all logits."""

import copy
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

import ftaccum
from ftaccum import Result, test_fine_tuning
from ftaccum.tasks.token_accuracy import PredictedTokens, TokenAccuracy
from heads import HEADS, IGNORED, RecordingOptimizer, Row, relative_error
from labelled_heads import choices_of_head

MASKED, CAUSAL, T5 = "masked LM, BERT", "causal LM, Llama", "seq2seq, T5"
SHORT_WAY = "labelled positions only."


def trained(model: nn.Module, rows: list[Row], **arguments: Any) -> Result:
    defaults: dict[str, Any] = {
        "batch_size": 3, "effective_batch_size": 5, "n_epochs": 2, "learning_rate": 0.1, "progress": False,
        "audit": False, "verbosity": "debug", "val_data": HEADS[MASKED].rows(7, seed=8),
    }  # fmt: skip
    return test_fine_tuning(copy.deepcopy(model), train_data=rows, **defaults | arguments)


def both_ways(name: str, *, return_dict: bool = True, **arguments: Any) -> tuple[Result, Result]:
    """Return the result with logits at labelled positions, and that with all logits."""
    head = HEADS[name]
    model: Any = head.model()
    model.config.return_dict = return_dict
    val = head.rows(7, seed=8)
    val[2]["labels"] = [IGNORED] * len(val[2]["labels"])
    with choices_of_head() as choices:
        found = [
            trained(model, head.rows(), **{"val_data": val, "loss_head": loss_head} | arguments)
            for loss_head in ("auto", "full")
        ]
    assert choices == [SHORT_WAY]
    return found[0], found[1]


def token_accuracy(name: str) -> dict[str, Any]:
    accuracy = TokenAccuracy(next_token="causal" in name)
    return {"compute_metrics": accuracy, "preprocess_logits_for_metrics": PredictedTokens()}


def checksum(predictions: Any) -> dict[str, float]:
    """Return a number that depends on each prediction at a labelled position, and on its place."""
    labels = predictions.label_ids
    rows, columns = np.indices(labels.shape)
    places = 100 * rows + columns + 1  # the same at any width, and a compiled model has its own
    counted = (labels != IGNORED)[:, int(labels.max() < 0) :]
    return {"sum": float((predictions.predictions * places)[counted].sum())}


METRICS: dict[str, tuple[str, dict[str, Any]]] = {
    "no metrics": (MASKED, {}),
    "an `evaluate` module": (MASKED, {"compute_metrics": ftaccum.Accuracy()}),
    "an `evaluate` module, with a shift": (CAUSAL, {"compute_metrics": ftaccum.Accuracy()}),
    "an `evaluate` module, sequence to sequence": (T5, {"compute_metrics": ftaccum.Accuracy()}),
    "the accuracy of tokens": (MASKED, token_accuracy(MASKED)),
    "the accuracy of tokens, with a shift": (CAUSAL, token_accuracy(CAUSAL)),
    "predicted tokens": (MASKED, {"compute_metrics": checksum, "preprocess_logits_for_metrics": PredictedTokens()}),
}


def first(logits: Any) -> Tensor:
    return logits[0] if isinstance(logits, tuple) else logits


@pytest.mark.parametrize("metrics", METRICS)
def test_the_validation_loss_and_metrics_equal_those_of_all_logits(metrics: str) -> None:
    name, arguments = METRICS[metrics]
    short, full = both_ways(name, **arguments)
    assert short.val_loss_history == pytest.approx(full.val_loss_history, rel=1e-6)
    assert short.metrics == full.metrics


def test_a_function_of_logits_gets_those_of_all_positions() -> None:
    shapes = []

    def keep(logits: Tensor, labels: Tensor) -> Tensor:
        shapes.append((tuple(logits.shape), (*labels.shape, 61)))
        return logits.argmax(-1)

    both_ways(MASKED, compute_metrics=lambda _: {"n": 1.0}, preprocess_logits_for_metrics=keep)
    assert shapes
    assert all(found == wanted for found, wanted in shapes)


def test_predicted_tokens_are_read_from_outputs_without_names() -> None:
    arguments = {"compute_metrics": checksum, "preprocess_logits_for_metrics": PredictedTokens()}
    short, full = both_ways(MASKED, return_dict=False, **arguments)
    assert short.metrics == full.metrics


@pytest.mark.slow
def test_a_compiled_model_has_the_same_gradients_and_metrics() -> None:
    gradients, metrics = [], []
    for compiled in (False, True):
        model = HEADS[MASKED].model()
        optimizer = RecordingOptimizer(model)
        with choices_of_head() as choices:
            result = test_fine_tuning(
                model, train_data=HEADS[MASKED].rows(12), val_data=HEADS[MASKED].rows(7, seed=8), batch_size=2,
                effective_batch_size=5, n_epochs=2, gradient_clip_norm=None, progress=False, verbosity="debug",
                audit=False, optimizer=optimizer, compile=compiled, compute_metrics=checksum,
                preprocess_logits_for_metrics=lambda logits, _: first(logits).argmax(-1),
            )  # fmt: skip
        assert choices == [SHORT_WAY]
        gradients.append(optimizer.gradients)
        metrics.append(result.metrics)
    assert max(map(relative_error, *gradients)) < 1e-6
    assert metrics[0] == metrics[1]


@pytest.mark.slow
def test_a_model_that_the_launcher_compiles_computes_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    with choices_of_head() as choices:
        trained(HEADS[MASKED].model(), HEADS[MASKED].rows())
    assert choices == ["all positions: the launcher compiles the model."]
