"""The warning about a loss that is divided by the accumulation steps."""

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ftaccum
from ftaccum import LossScaleWarning
from ftaccum.training import build_data


class Classifier(nn.Module):
    """A model with a loss of its own, dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 4))

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layers(inputs)
        return {"logits": logits} if labels is None else {"logits": logits, "loss": F.cross_entropy(logits, labels)}


class ZeroHead(Classifier):
    """The same model with a new head of zeros, for which many losses are multiples of log 2."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.layers[2].parameters():
            nn.init.zeros_(parameter)


class WithoutLoss(Classifier):
    """The same model, which leaves the loss to the caller."""

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"logits": self.layers(inputs)}


def cross_entropy(outputs: Any, batch: Any, **options: Any) -> Tensor:
    return F.cross_entropy(outputs["logits"], batch["labels"], **options)


def warned(loss_fn: Callable[[Any, Any], Any], model: type[Classifier] = Classifier, **settings: Any) -> list[str]:
    """Return the warnings about the scale of the loss of a short run."""
    rows = [{"inputs": torch.randn(3), "labels": n % 4} for n in range(8)]
    settings = {"n_epochs": 1, "validation_split": 0, "progress": False, "on_inexact": "ignore", **settings}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        ftaccum.test_fine_tuning(model(), train_data=rows, loss_fn=loss_fn, audit=False, **settings)
    return [str(each.message) for each in found if each.category is LossScaleWarning]


def test_a_loss_divided_by_the_accumulation_steps_is_reported() -> None:
    (sentence,) = warned(
        lambda outputs, batch: cross_entropy(outputs, batch) / 2, batch_size=2, gradient_accumulation_steps=2
    )
    assert sentence.startswith(
        "`loss_fn` returns 1/2 of the model's own loss on the same rows, and this run accumulates that many "
        "micro-batches. If it divides by the accumulation steps, remove the division"
    )


def test_a_loss_divided_by_another_number_is_reported() -> None:
    (sentence,) = warned(lambda outputs, batch: cross_entropy(outputs, batch) / 8)
    assert sentence.startswith("`loss_fn` returns 1/8 of the model's own loss on the same rows. If it divides")


def test_a_sum_and_a_dict_of_terms_are_reported_when_divided() -> None:
    assert warned(lambda o, b: cross_entropy(o, b, reduction="sum") / 4, reduction="sum")
    assert warned(lambda o, b: {name: cross_entropy(o, b) / 8 for name in ("one", "other")})


@pytest.mark.parametrize(
    "loss_fn",
    [
        cross_entropy,
        lambda outputs, batch: 2 * cross_entropy(outputs, batch),
        lambda outputs, batch: cross_entropy(outputs, batch) / 2.01,
        lambda outputs, batch: cross_entropy(outputs, batch) / 100,
        lambda outputs, batch: cross_entropy(outputs, batch, label_smoothing=0.2) / 4,
        lambda outputs, batch: cross_entropy(outputs, batch, weight=torch.tensor([1.0, 2, 3, 4])) / 4,
        lambda outputs, batch: F.mse_loss(outputs["logits"], F.one_hot(batch["labels"], 4).float()),
    ],
    ids=["equal", "twice", "2.01", "100", "smoothed", "weighted", "another loss"],
)
def test_other_losses_are_not_reported(loss_fn: Callable[[Any, Any], Tensor]) -> None:
    assert warned(loss_fn) == []


def test_a_new_head_of_zeros_causes_no_false_report() -> None:
    """Without noise on the head, the model's loss is log 4, and the mean of four binary losses is log 2."""

    def loss_fn(outputs: Any, batch: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs["logits"], F.one_hot(batch["labels"], 4).float())

    assert warned(loss_fn, model=ZeroHead) == []


def test_a_large_number_is_reported_if_it_is_the_accumulation_steps() -> None:
    assert warned(lambda o, b: cross_entropy(o, b) / 100, gradient_accumulation_steps="0:1,1:100", batch_size=2)


def test_a_ratio_that_is_a_whole_number_on_one_batch_only_is_not_reported() -> None:
    """The loss of all rows together is a quarter of the model's, but the loss of a single row is half of it."""

    def loss_fn(outputs: Any, batch: Any) -> Tensor:
        return cross_entropy(outputs, batch) / (4 if len(batch["labels"]) == 4 else 2)

    assert warned(loss_fn) == []


def test_a_model_without_a_loss_of_its_own_is_not_asked_for_one() -> None:
    assert warned(lambda outputs, batch: cross_entropy(outputs, batch) / 2, model=WithoutLoss) == []


def test_labels_that_the_model_cannot_use_are_no_error() -> None:
    """The model's own loss would raise an error for class 9, but `loss_fn` takes it modulo 4."""
    rows = [{"inputs": torch.randn(3), "labels": 9} for _ in range(8)]
    ftaccum.test_fine_tuning(
        Classifier(),
        train_data=rows,
        loss_fn=lambda outputs, batch: F.cross_entropy(outputs["logits"], batch["labels"] % 4),
        n_epochs=1,
        validation_split=0,
        on_inexact="ignore",
        progress=False,
    )


def test_comparing_the_losses_changes_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def watched(model: nn.Module, objective: Any, sample: Any) -> int | None:
        def state() -> list[Any]:
            tensors = [t.clone() for t in model.state_dict().values()]
            generators = [torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(np.int64))]
            return [*tensors, *generators, torch.tensor([m.training for m in model.modules()])]

        before, python = state(), random.getstate()
        found = original(model, objective, sample)
        measured.append(all(map(torch.equal, before, state())) and python == random.getstate())
        measured.append(found == 2 and all(p.grad is None for p in model.parameters()))
        return found

    original = build_data.find_divisor
    monkeypatch.setattr(build_data, "find_divisor", watched)
    assert warned(lambda outputs, batch: cross_entropy(outputs, batch) / 2)
    assert measured == [True, True]
