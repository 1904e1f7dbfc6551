"""Losses that leave out or weight items by a rule, where rows show several rules that may be the one."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn

from ftaccum import SettingsError
from ftaccum.data.dataset import Rows
from ftaccum.data.further_rows import further_rows
from ftaccum.data.rare_rows import LabelKind, RareRows
from silent_errors.case import update_error

Columns = dict[str, Tensor]
LossFn = Callable[[Tensor, Columns], Tensor]
N_ROWS = 300
RARE = [37, 111, 202, 203, 255]


def columns(n_rows: int = N_ROWS, **others: Tensor) -> Columns:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n_rows, 6, generator=draw, dtype=torch.float64)
    return {"x": x, "labels": torch.randn(n_rows, generator=draw, dtype=torch.float64), **others}


def ones_but(zeros: list[int], *size: int, n_rows: int = N_ROWS, dtype: torch.dtype = torch.float64) -> Tensor:
    found = torch.ones(n_rows, *size, dtype=dtype)
    found[zeros] = 0
    return found


def error_of(loss_fn: LossFn, whole: Columns, n_outputs: int = 1, **arguments: Any) -> float:
    """Return the relative error of an update of all rows, compared with one batch."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, n_outputs)).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    torch.manual_seed(0)
    n_rows = len(whole["x"])
    rows = [{name: column[n] for name, column in whole.items()} for n in range(n_rows)]
    return update_error(
        Net(), rows, lambda model: loss_fn(model(whole["x"]), whole), n_rows, batch_size=4, loss_fn=loss_fn, **arguments
    )


def squares(outputs: Tensor, batch: Columns) -> Tensor:
    return (outputs if batch["labels"].ndim > 1 else outputs[:, 0]).sub(batch["labels"]).square()


def weighted(name: str) -> LossFn:
    def loss_fn(outputs: Tensor, batch: Columns) -> Tensor:
        weights = batch[name].double()
        return (weights * squares(outputs, batch)).sum() / weights.sum()

    return loss_fn


def weighted_classes(outputs: Tensor, batch: Columns) -> Tensor:
    losses = F.cross_entropy(outputs, batch["labels"], reduction="none")
    return (batch["w"] * losses).sum() / batch["w"].sum()


@pytest.mark.parametrize("zeros", [RARE[:1], RARE, list(range(0, N_ROWS, 5))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.long, torch.bool])
def test_a_weight_of_0_or_1_is_not_taken_for_a_measurement_that_the_loss_leaves_out(
    zeros: list[int], dtype: torch.dtype
) -> None:
    assert error_of(weighted("w"), columns(w=ones_but(zeros, dtype=dtype))) <= 1e-9


def test_weights_of_elements_are_not_taken_for_measurements_that_the_loss_leaves_out() -> None:
    mask = ones_but([], 5)
    mask[RARE, 2:], mask[17, 1] = 0, 0
    labels = torch.randn(N_ROWS, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert error_of(weighted("mask"), columns(labels=labels, mask=mask), 5) <= 1e-9


@pytest.mark.parametrize("zeros", [RARE[:1], RARE])
def test_a_weight_of_0_is_not_taken_for_a_class_that_the_loss_leaves_out(zeros: list[int]) -> None:
    whole = columns(labels=torch.arange(N_ROWS) % 41, w=ones_but(zeros))
    assert error_of(weighted_classes, whole, 41) <= 1e-9


def test_a_class_that_the_loss_leaves_out_is_not_taken_for_a_flag_that_some_of_its_rows_have() -> None:
    labels = torch.arange(N_ROWS) % 7
    labels[RARE] = 7  # the first of them has the flag, too

    def loss_fn(outputs: Tensor, batch: Columns) -> Tensor:
        return F.cross_entropy(outputs, batch["labels"], ignore_index=7)

    assert error_of(loss_fn, columns(labels=labels, w=ones_but(RARE[:1])), 7) <= 1e-9
    assert error_of(loss_fn, columns(labels=labels, w=ones_but(RARE[:3])), 7) <= 1e-9


def test_a_flag_is_not_taken_for_another_one_that_some_of_its_rows_have() -> None:
    whole = columns(other=ones_but(RARE[1:2]), w=ones_but(RARE), most=ones_but([*RARE, 17]))
    assert error_of(weighted("w"), whole) <= 1e-9


def test_rows_that_an_input_leaves_out_are_reported_and_no_label_is_blamed() -> None:
    whole = columns(w=torch.ones(N_ROWS, dtype=torch.float64))
    whole["w"][RARE] = whole["x"][RARE, 0] = 9.0

    def loss_fn(outputs: Tensor, batch: Columns) -> Tensor:
        return squares(outputs, batch)[batch["x"][:, 0] < 9].mean()

    assert error_of(loss_fn, whole) <= 1e-9, "the column shows the same rows"
    whole["w"][[17, 18]] = 9.0
    with pytest.raises(SettingsError, match="`count_items`"):
        error_of(loss_fn, whole)


def without(missing: float) -> LossFn:
    def loss_fn(outputs: Tensor, batch: Columns) -> Tensor:
        labels = batch["labels"]
        known = ~labels.isnan() if missing != missing else labels != missing
        return F.mse_loss(outputs.reshape(labels.shape)[known], labels[known])

    return loss_fn


@pytest.mark.parametrize("missing", [math.nan, math.inf, -999.0, 0.0])
@pytest.mark.parametrize("n_outputs", [1, 4])
def test_measurements_that_are_missing_in_a_few_rows_are_left_out_of_the_mean(missing: float, n_outputs: int) -> None:
    whole = columns()
    if n_outputs > 1:
        whole["labels"] = torch.randn(N_ROWS, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        whole["labels"][RARE, 1] = missing
    else:
        whole["labels"][RARE] = missing
    assert error_of(without(missing), whole, n_outputs) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_numbers_that_are_missing_in_a_few_rows_are_left_out_of_the_mean(dtype: torch.dtype) -> None:
    labels = (torch.arange(N_ROWS) % 5).to(dtype)
    labels[RARE] = -1

    def loss_fn(outputs: Tensor, batch: Columns) -> Tensor:
        return F.cross_entropy(outputs, batch["labels"].long(), ignore_index=-1)

    assert error_of(loss_fn, columns(labels=labels), 5) <= 1e-9


def masked(outputs: Tensor, batch: Columns) -> Tensor:
    weights = batch["mask"].double()
    return (weights * (outputs - batch["y"]).square()).sum() / weights.sum()


@pytest.mark.parametrize("others", [{}, {"labels": torch.arange(N_ROWS) % 3}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bool])
def test_a_mask_over_several_numbers_of_a_row_is_found_without_labels_of_its_shape(
    others: Columns, dtype: torch.dtype
) -> None:
    mask, whole = ones_but([], 5), columns()
    mask[RARE, 3:] = 0
    whole = {"x": whole["x"], "y": whole["x"][:, :5].flip(0), "mask": mask.to(dtype), **others}
    assert error_of(masked, whole, 5) <= 1e-9


def test_numbers_that_are_missing_in_a_column_with_a_name_of_its_own_are_left_out_of_the_mean() -> None:
    whole = columns()
    whole = {"x": whole["x"], "y": whole["x"][:, :5].flip(0)}
    whole["y"][RARE, 2] = math.nan

    def loss_fn(outputs: Tensor, batch: Columns) -> Tensor:
        known = ~batch["y"].isnan()
        return F.mse_loss(outputs[known], batch["y"][known])

    assert error_of(loss_fn, whole, 5) <= 1e-9


def test_a_weight_of_0_is_found_in_rows_with_more_classes_than_are_measured() -> None:
    whole = columns(labels=torch.arange(N_ROWS) % 100, w=ones_but(RARE))
    assert error_of(weighted_classes, whole, 100) <= 1e-9


def test_a_weight_of_0_is_found_if_weights_of_other_rows_are_fractions() -> None:
    whole = columns(w=ones_but(RARE))
    whole["w"][[0, 60, 99]] = 0.5
    assert error_of(weighted("w"), whole) <= 1e-9


def below(threshold: float) -> LossFn:
    return lambda outputs, batch: squares(outputs, batch)[batch["labels"] < threshold].mean()


def test_a_loss_that_leaves_out_large_labels_is_reported() -> None:
    labels = columns()["labels"]
    labels[RARE] = torch.tensor([7.1, 7.2, 7.3, 7.4, 7.5], dtype=torch.float64)
    with pytest.raises(SettingsError, match="row 255: 0 times"):
        error_of(below(7.0), columns(labels=labels))


def test_a_product_of_two_masks_is_reported() -> None:
    def loss_fn(outputs: Tensor, batch: Columns) -> Tensor:
        weights = batch["v"] * batch["w"]
        return (weights * squares(outputs, batch)).sum() / weights.sum()

    with pytest.raises(SettingsError, match="`count_items`"):
        error_of(loss_fn, columns(v=ones_but(RARE[:2]), w=ones_but(RARE[2:])))


@pytest.mark.parametrize("as_table", [False, True])
def test_one_missing_number_of_10_000_is_measured_and_few_other_measurements(as_table: bool) -> None:
    drawn = np.random.RandomState(0).randn(10_000, 2)
    drawn[7777, 0], drawn[40, 1] = math.nan, math.inf
    rows = [{"x": [0.5], "labels": label, "age": age} for label, age in drawn.tolist()]
    found = RareRows.of(Rows("train_data", Dataset.from_list(rows) if as_table else rows), -100, LabelKind())
    extremes = {int(np.nanargmin(drawn[:, 0])), int(np.nanargmax(drawn[:, 0])), int(drawn[:, 1].argmin())}
    assert {7777, 40, *extremes} <= set(found.positions)
    assert len(found.positions) < 8
    assert not found.not_looked_at


def test_labels_leave_some_of_the_measured_rows_to_other_columns() -> None:
    rows = [{"x": [0.5], "labels": n % 200, "w": float(n != 333), "kind": n % 7} for n in range(800)]
    found = RareRows.of(Rows("train_data", rows), -100, LabelKind())
    assert 333 in found.positions
    assert len(found.positions) == 65
    assert {rows[n]["kind"] for n in found.positions} == set(range(7))


def test_further_rows_have_the_value_of_one_rule_and_are_not_measured_twice() -> None:
    draw = np.random.RandomState(0)
    rows = [
        {"x": 0.1, "w": float(n not in (4, 9, 30)), "label": 17 if n in (4, 9, 50, 51) else n % 5} for n in range(99)
    ]
    draw.shuffle(rows)
    places = lambda keep: {n for n, row in enumerate(rows) if keep(row)}
    only_w, only_label = (
        places(lambda row: not row["w"] and row["label"] != 17),
        places(lambda row: row["label"] == 17 and row["w"]),
    )
    both = places(lambda row: row["label"] == 17 and not row["w"])
    found = further_rows(Rows("train_data", rows), [("w", [0.0]), ("labels", [17.0])], sorted(both)[:1])
    assert set(found) == only_w | only_label | set(sorted(both)[1:])
    assert further_rows(Rows("train_data", rows), [("absent", [0.0])], []) == []
