"""Validation: every row counts once at any batch size, and metrics need no hub."""

import json
from collections.abc import Callable
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from torch import nn
from transformers import EvalPrediction

from evaluated import ROWS, VAL_ROWS, evaluated, reference
from ftaccum import F1, Accuracy, ClassificationMetrics, MeanSquaredError, SettingsError, test_fine_tuning
from heads import HEADS, all_in_float64, one_batch
from test_generation import OPTIONS, predicted


@pytest.mark.parametrize("name", ["causal LM, Llama", "token classification, BERT", "question answering, BERT"])
@pytest.mark.parametrize("batch_size", [1, 3, 5, 64])
def test_validation_loss_is_the_mean_over_all_items(name: str, batch_size: int) -> None:
    found = evaluated(name, batch_size=batch_size, effective_batch_size=64)
    assert found.initial_loss == pytest.approx(reference(name), rel=1e-9)


def test_rows_without_labels_do_not_change_the_validation_loss() -> None:
    name = "token classification, BERT"
    silent = [{**row, "labels": [-100] * len(row["labels"])} for row in HEADS[name].rows(4, seed=3)]
    found = evaluated(name, batch_size=1, val_data=[*silent[:2], *VAL_ROWS[name], *silent[2:]])
    assert found.initial_loss == pytest.approx(reference(name), rel=1e-9)


def test_accuracy_excludes_ignored_labels() -> None:
    name = "token classification, BERT"
    head = HEADS[name]
    found = evaluated(name, batch_size=3, compute_metrics=Accuracy(), learning_rate=1e-12)
    right = total = 0
    for row in VAL_ROWS[name]:
        logits = head.model().eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        labels = torch.tensor(row["labels"])
        right += int((logits.argmax(-1) == labels)[labels != -100].sum())
        total += int((labels != -100).sum())
    assert found.metrics == [{"accuracy": right / total}]


def test_accuracy_of_a_causal_lm_compares_the_next_token() -> None:
    name = "causal LM, Llama"
    head = HEADS[name]
    found = evaluated(name, batch_size=3, compute_metrics=Accuracy(), learning_rate=1e-12)
    counted = evaluated(
        name, batch_size=3, compute_metrics=Accuracy(), learning_rate=1e-12,
        count_items=lambda batch: (batch["labels"][:, 1:] != -100).sum(),
    )  # fmt: skip
    assert counted.metrics == found.metrics
    right = total = 0
    for row in VAL_ROWS[name]:
        guesses = head.model().eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].argmax(-1)
        labels = torch.tensor(row["labels"])[1:]
        right += int((guesses == labels)[labels != -100].sum())
        total += int((labels != -100).sum())
    assert found.metrics == [{"accuracy": pytest.approx(right / total)}]


def test_metrics_exclude_labels_that_the_loss_function_ignores() -> None:
    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(5.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.one_hot(x, 4).float() * self.scale

    rows = [(torch.tensor(n % 4), torch.tensor(n % 4 if n % 4 else 0)) for n in range(12)]
    wrong = [(torch.tensor(1), torch.tensor(0))] * 3  # wrong if the label 0 counted
    loss = nn.CrossEntropyLoss(ignore_index=0)
    found = test_fine_tuning(
        Copies(), train_data=rows, val_data=rows + wrong, loss_fn=loss, compute_metrics=Accuracy(), n_epochs=1,
        progress=False,
    )  # fmt: skip
    assert found.metrics == [{"accuracy": 1.0}]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_rows_without_labels_reach_the_metrics_too(batch_size: int) -> None:
    name = "token classification, BERT"
    silent = [{**row, "labels": [-100] * len(row["labels"])} for row in HEADS[name].rows(4, seed=3)]
    count = lambda prediction: {"rows": len(prediction.predictions)}
    found = evaluated(name, batch_size=batch_size, val_data=[*silent, *VAL_ROWS[name]], compute_metrics=count)
    assert found.metrics == [{"rows": 17}]


def test_multi_label_accuracy_counts_binary_decisions() -> None:
    name = "multi-label, BERT"
    found = evaluated(name, batch_size=4, compute_metrics=Accuracy(), learning_rate=1e-12)
    with torch.no_grad(), all_in_float64():
        batch = one_batch(VAL_ROWS[name])
        logits = HEADS[name].model().eval()(**batch).logits
    assert found.metrics == [{"accuracy": pytest.approx(((logits > 0) == batch["labels"]).double().mean().item())}]


def test_metrics_without_labels_are_refused_before_training() -> None:
    with pytest.raises(SettingsError, match="`compute_metrics` compares with `labels`"):
        evaluated("question answering, BERT", batch_size=4, compute_metrics=Accuracy())


def test_metrics_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(SettingsError, match="`compute_metrics` must return numbers, but returned"):
        evaluated("token classification, BERT", batch_size=4, compute_metrics=lambda _: {"per class": [1, 2]})


def test_a_function_gets_all_predictions_in_the_order_of_the_rows() -> None:
    name = "token classification, BERT"
    got: list[EvalPrediction] = []

    def keep(prediction: EvalPrediction) -> dict[str, float]:
        got.append(prediction)
        return {"rows": len(prediction.predictions)}

    found = evaluated(name, batch_size=4, compute_metrics=keep)
    assert found.metrics == [{"rows": len(VAL_ROWS[name])}]
    widest = max(len(row["labels"]) for row in VAL_ROWS[name])
    for row, labels in zip(VAL_ROWS[name], got[0].label_ids, strict=True):
        assert labels.tolist() == row["labels"] + [-100] * (widest - len(row["labels"]))
    assert got[0].predictions.shape == (len(VAL_ROWS[name]), widest, 3)


def test_metrics_that_are_not_a_dict_are_refused() -> None:
    with pytest.raises(SettingsError, match="`compute_metrics` must return a dict of numbers by name, but returned 3"):
        evaluated("token classification, BERT", batch_size=4, compute_metrics=lambda _: 3)


def test_metrics_equal_those_of_scikit_learn_and_can_be_combined() -> None:
    guesses, truths = [0, 1, 1, 2], [0, 1, 2, 2]
    assert Accuracy().compute(predictions=guesses, references=truths) == {"accuracy": 0.75}
    scores = F1(average="macro").compute(predictions=guesses, references=truths)
    assert scores == pytest.approx(
        {"f1": (1 + 2 / 3 + 2 / 3) / 3, "precision": (1 + 0.5 + 1) / 3, "recall": (1 + 1 + 0.5) / 3}
    )
    assert ClassificationMetrics().compute(predictions=guesses, references=truths) == {"accuracy": 0.75, **scores}
    assert MeanSquaredError().compute(predictions=[1.0, 2.0], references=[1.0, 4.0]) == {"mse": 2.0}
    together = evaluate.combine([Accuracy(), F1()])
    assert together.compute(predictions=guesses, references=truths) == {"accuracy": 0.75, **scores}
    assert evaluated("token classification, BERT", batch_size=4, compute_metrics=together).metrics[0].keys() == {
        "accuracy", *scores
    }  # fmt: skip


def test_regression_metrics_use_the_raw_outputs() -> None:
    found = evaluated("regression, BERT", batch_size=4, compute_metrics=MeanSquaredError(), learning_rate=1e-12)
    assert found.metrics[0]["mse"] == pytest.approx(found.final_loss, rel=1e-6)


def test_bf16_outputs_reach_the_metrics() -> None:
    def finite(prediction: EvalPrediction) -> dict[str, Any]:
        return {"finite": np.isfinite(prediction.predictions).mean()}

    name = "sequence classification, BERT"
    found = evaluated(name, batch_size=4, model=HEADS[name].model().bfloat16(), compute_metrics=finite)
    assert found.metrics == [{"finite": 1.0}]


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_evaluate_the_same_rows(two_processes: Callable[..., str]) -> None:
    printed = two_processes("evaluation_of_two.py")
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("FOUND "))[6:])
    for name in found["losses"]:
        assert found["losses"][name] == pytest.approx([reference(name)] * 2, rel=1e-9)
    name = "token classification, BERT"
    alone = evaluated(name, batch_size=3, compute_metrics=Accuracy(), learning_rate=1e-12)
    assert found["accuracy"] == [alone.metrics] * 2
    assert found["order"] == [[row["labels"][0] for row in VAL_ROWS[name]]] * 2
    assert found["errors"] == ["`compute_metrics` failed on the main process: OwnError('broken')"] * 2
    assert found["cause"] == "OwnError"
    assert found["checkpoints"] == ["update-00000003"]  # the epoch is in a checkpoint
    (told,) = set(found["no metrics"])
    assert told.startswith("`compute_metrics` must return a dict of numbers by name, but returned 3")
    assert len(ROWS[name]) == 9

    name = "causal LM, Llama"
    for row, ids in zip(VAL_ROWS[name], found["ids"], strict=True):
        with torch.no_grad(), all_in_float64():
            logits = HEADS[name].model().eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        wanted = logits.argmax(-1).tolist()
        assert ids == wanted + [-100] * (len(ids) - len(wanted))
    assert found["gathered"] == [[13, 13], [0, 0]]
    sampled = predicted(name, eval_batch_size=3, generation_kwargs=OPTIONS | {"do_sample": True, "top_k": 0})
    assert found["texts"] == sampled.predictions.tolist()
    (failed,) = set(found["failed"])
    assert failed.startswith("MetricsError: `preprocess_logits_for_metrics` failed on row")
    assert "OwnError('broken') (Process 1 raised this" in failed
    (odd,) = set(found["shape"])
    assert odd.startswith("SettingsError: The result of `preprocess_logits_for_metrics` must have the rows")


@pytest.mark.parametrize(
    ("logits", "labels", "said"),
    [
        (torch.zeros(2, 1), torch.tensor([[0.0], [2.5]]), r"\(Accuracy\) compares classes.*such as 2\.5"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long), r"the logits have the shape \(\d, 3, 4\)"),
    ],
    ids=["numbers", "classes not last"],
)
def test_labels_that_a_module_cannot_compare_with_classes_are_refused(logits: Any, labels: Any, said: str) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, rows_B: torch.Tensor) -> torch.Tensor:
            return logits[:1].expand(len(rows_B), *logits.shape[1:]) + self.weight

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return outputs.flatten(1).sum(1).mean() + 0 * targets.sum()

    rows = [(torch.zeros(()), each) for each in labels] * 2
    with pytest.raises(SettingsError, match=said):
        test_fine_tuning(
            Fixed(), train_data=rows, val_data=rows, loss_fn=loss, compute_metrics=Accuracy(), progress=False
        )
