"""Terms that some batches lack, and batches changed in a forward pass: exact, or an error that names the rows."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftaccum import DataError, SettingsError, test_fine_tuning
from ftaccum.objective.batch_changes import WatchedBatch, fresh_batch
from ftaccum.objective.item_counts import ItemCounter
from ftaccum.objective.model_forward import ModelForward
from ftaccum.objective.objective import Objective
from ftaccum.objective.sample import Sample
from ftaccum.objective.self_check import measured_objective

CPU = torch.device("cpu")
Batch = dict[str, Tensor]


def batch_of(boxes: list[int]) -> Batch:
    draw = torch.Generator().manual_seed(0)
    n = len(boxes)
    return {
        "x": torch.randn(n, 3, generator=draw), "labels": torch.arange(n) % 2,
        "box": torch.randn(n, generator=draw), "has_box": torch.tensor(boxes),
    }  # fmt: skip


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def loss_fn(outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
    found = {"cls": F.cross_entropy(outputs[:, :2], batch["labels"])}
    has_box = batch["has_box"].bool()
    return found | ({"box": F.mse_loss(outputs[has_box, 2], batch["box"][has_box])} if has_box.any() else {})


def counts(batch: Batch) -> dict[str, Any]:
    return {"cls": len(batch["labels"]), "box": batch["has_box"].sum()}


def rows(batch: Batch, places: Any) -> Batch:
    return {name: column[list(places)] for name, column in batch.items()}


def objective_of(boxes: list[int], loss_fn: Any = loss_fn, **more: Any) -> tuple[nn.Module, Objective]:
    together = batch_of(boxes)
    sample = Sample(
        rows(together, [0]), together, lambda batch, groups: [rows(batch, group) for group in groups],
        lambda groups: [rows(together, group) for group in groups], names=["a", "b", "c", "d"],
    )  # fmt: skip
    model = Detector()
    forward = ModelForward(model, together, loss_fn)
    return model, measured_objective(model, forward, sample, item_counter=ItemCounter(), **more)


def means(model: nn.Module, objective: Objective, batch: Batch) -> Mapping[str, float]:
    counted = objective.count(batch)
    terms = [term for term, n in counted.items() if n]
    found, _ = objective.means(model, fresh_batch(batch, CPU), counted, terms, "rows 5, 6 of `train_data`")
    return {term: mean.item() for term, mean in found.items()}


def test_a_term_that_the_user_counts_may_be_missing_in_all_sample_rows() -> None:
    model, objective = objective_of([0, 0, 0, 0], count_items=counts)
    assert objective.terms == ("cls", "box")
    assert not objective.report.inexact()
    assert set(means(model, objective, batch_of([0, 0]))) == {"cls"}
    assert set(means(model, objective, batch_of([0, 1]))) == {"cls", "box"}


def test_a_term_that_no_sample_row_had_is_an_error_that_names_the_rows() -> None:
    model, objective = objective_of([0, 0, 0, 0])
    assert means(model, objective, batch_of([0, 0]))
    with pytest.raises(DataError, match=r"loss of rows 5, 6 of `train_data` has a term 'box', .* Give `count_items`"):
        means(model, objective, batch_of([0, 1]))


def test_a_term_that_some_rows_lack_and_that_cannot_be_counted_is_an_error() -> None:
    with pytest.raises(
        SettingsError, match=r"term 'box' for some rows and not for others.*\['cls', 'box'\], and 0 for"
    ):
        objective_of([0, 1, 0, 1])


def test_a_term_that_is_counted_and_missing_is_an_error_that_names_the_rows() -> None:
    def too_many(batch: Batch) -> dict[str, Any]:
        return {"cls": len(batch["labels"]), "box": batch["has_box"].sum() or int(len(batch["labels"]) == 2)}

    model, objective = objective_of([1, 1, 1, 1], count_items=too_many)
    with pytest.raises(
        DataError, match=r"loss of rows 5, 6 .* has no term 'box', but it should be a mean over 1 items"
    ):
        means(model, objective, batch_of([0, 0]))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_term_without_items_may_be_0_or_nan(value: float) -> None:
    def always(outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"box": outputs.sum() * value} | loss_fn(outputs, batch)

    model, objective = objective_of([0, 0, 1, 1], always, count_items=counts)
    assert not objective.report.inexact()
    assert set(means(model, objective, batch_of([0, 0]))) == {"cls"}


def test_a_mean_over_no_items_that_is_not_0_is_an_error() -> None:
    def always(outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        return loss_fn(outputs, batch) | {"box": outputs[:, 2].square().mean()}

    with pytest.raises(DataError, match=r"term 'box' of the loss of the first rows is .*, but no items"):
        objective_of([0, 0, 0, 0], always, count_items=counts)


def test_a_count_without_one_of_the_terms_is_an_error() -> None:
    with pytest.raises(SettingsError, match=r"must count every term of the loss, \['box', 'cls'\], but counts \['cls'"):
        objective_of([1, 1, 1, 1], count_items=lambda batch: {"cls": len(batch["labels"])})


def test_a_sum_over_rows_may_be_missing_if_it_is_0() -> None:
    def per_row(outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        found = loss_fn(outputs, batch)
        return found | ({"box": found["box"] * batch["has_box"].double().mean()} if "box" in found else {})

    model, objective = objective_of([0, 1, 0, 1], per_row)
    assert not objective.report.inexact()
    assert means(model, objective, batch_of([0, 0]))["box"] == 0.0


def test_a_term_that_exists_only_in_train_mode_is_counted() -> None:
    model = Detector()

    def penalized(outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        found = {"cls": F.cross_entropy(outputs[:, :2], batch["labels"])}
        return found | ({"penalty": outputs.square().mean()} if model.training else {})

    together = batch_of([0, 0, 0, 0])
    sample = Sample(
        together, together, lambda batch, groups: [rows(batch, group) for group in groups], None, list("abcd")
    )
    objective = measured_objective(model, ModelForward(model, together, penalized), sample, item_counter=ItemCounter())
    assert objective.terms == ("cls", "penalty")
    assert means(model.eval(), objective, together)["penalty"] == 0.0


def test_a_forward_pass_gets_a_copy_of_its_batch() -> None:
    batch = {"x": torch.zeros(2), "pair": (torch.ones(2), "text"), "labels": torch.ones(1)}
    fresh = fresh_batch(batch, CPU)
    fresh["x"] += 1
    fresh["pair"][0].zero_()
    del fresh["labels"]
    assert batch["x"].tolist() == [0, 0]
    assert batch["pair"][0].tolist() == [1, 1]
    assert "labels" in batch
    assert fresh["pair"][1] == "text"


def test_changes_to_a_batch_in_a_forward_pass_are_detected() -> None:
    batch = {"x": torch.zeros(2), "labels": torch.ones(1), "y": torch.ones(1), "z": torch.ones(1)}
    watched = WatchedBatch(batch)
    assert watched.changed() == []
    batch["x"][batch["x"] > 5] = 3
    batch.pop("labels").add_(1)
    batch["y"] = batch["y"] * 2
    assert watched.changed() == ["x", "labels", "y"]
    assert {name: value.tolist() for name, value in watched.as_seen().items()} == {
        "x": [0, 0], "labels": [2], "y": [2], "z": [1],
    }  # fmt: skip
    pair = (torch.zeros(2), torch.ones(2))
    watched = WatchedBatch(pair)
    pair[1].add_(1)
    assert watched.changed() == ["targets"]


def ignoring(outputs: Tensor, batch: Batch) -> Tensor:
    batch["labels"][batch["has_box"] == 1] = -100
    return F.cross_entropy(outputs[:, :2], batch["labels"])


def test_labels_changed_in_place_in_a_forward_pass_are_an_error() -> None:
    with pytest.raises(DataError, match="changes `labels` of a batch in place, so the items that"):
        objective_of([0, 1, 0, 0], ignoring)
    model, objective = objective_of([0, 0, 0, 0], ignoring)
    assert means(model, objective, batch_of([0, 0]))
    with pytest.raises(DataError, match=r"of rows 5, 6 of `train_data` changes `labels` .* a mean over 1 items, but 2"):
        means(model, objective, batch_of([0, 1]))


def test_a_custom_count_of_the_labels_left_after_a_forward_pass_is_exact() -> None:
    model, objective = objective_of([0, 1, 0, 0], ignoring, count_items=lambda batch: (batch["has_box"] == 0).sum())
    assert not objective.report.inexact()
    assert means(model, objective, batch_of([0, 1]))


def test_a_row_that_is_refused_during_a_run_is_named_by_its_index() -> None:
    columns = batch_of([int(n == 13) for n in range(40)])
    data = [{name: column[n] for name, column in columns.items()} for n in range(40)]
    with pytest.raises(DataError, match=r"rows (\d+, )*13(, \d+)* of"):
        test_fine_tuning(
            Detector(), train_data=data, loss_fn=loss_fn, batch_size=2, n_epochs=1, validation_split=0.0, progress=False
        )  # fmt: skip
