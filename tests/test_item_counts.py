"""Counts of loss items against counts by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ftaccum.errors import DataError, SettingsError
from ftaccum.objective.item_counts import (
    ItemCounter,
    counts_from_user,
    relabelled,
    rows_of,
    targets_of,
    tensors_of,
)

LABELS = torch.tensor([[5, -100, 7, 8], [-100, -100, 4, -100], [6, 3, 2, 9]])
BATCH = {"input_ids": torch.ones(3, 4, dtype=torch.long), "labels": LABELS}


def counts(batch: Any, **arguments: Any) -> dict[str, float]:
    return {name: count(batch) for name, count in ItemCounter(**arguments).applicable(batch).items()}


def test_every_way_to_count_matches_its_name() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [1, 1, 1, 0]])
    batch = {**BATCH, "attention_mask": mask}
    wanted = {"labels": 8, "labels after the next-token shift": 6, "rows": 3, "elements": 12, "tokens": 9}
    assert counts(batch) == wanted
    assert list(counts(batch)) == list(wanted), "the order settles ties"
    assert counts(BATCH)["tokens"] == 12, "without a mask all tokens count"


def test_another_ignore_index_is_respected() -> None:
    assert counts(BATCH, ignore_index=4)["labels"] == 11


def test_class_weights_are_summed_over_the_labels_that_count() -> None:
    labels = torch.tensor([2, -100, 0, 2])
    found = counts((torch.zeros(4, 3), labels), declared=lambda: (-100, torch.tensor([0.5, 8.0, 2.0])))
    assert found == {"class weights": 4.5, "labels": 3, "rows": 4, "elements": 4}
    assert next(iter(found)) == "class weights"


def test_labels_in_one_column_have_no_shift() -> None:
    assert "labels after the next-token shift" not in counts(
        {"x": torch.zeros(3, 2), "labels": torch.ones(3, 1).long()}
    )
    assert "labels after the next-token shift" in counts({"x": torch.zeros(3, 2), "labels": torch.ones(3, 2).long()})


def test_floating_targets_are_counted_by_rows_and_elements() -> None:
    targets = torch.zeros(3, 2)
    weighted = counts((torch.zeros(3, 5), targets), declared=lambda: (-100, torch.ones(2)))
    assert weighted == {"rows": 3, "elements": 6}


def test_without_targets_rows_and_tokens_can_be_counted() -> None:
    assert counts({"input_ids": torch.ones(2, 5).long()}) == {"rows": 2, "tokens": 10}
    assert counts({"x": torch.ones(2, 5)}) == {"rows": 2}


@pytest.mark.parametrize(("targets", "wanted"), [(LABELS, "labels"), (torch.zeros(3, 2), "elements"), (None, "rows")])
def test_a_sum_is_counted_as_pytorch_reduces(targets: Tensor | None, wanted: str) -> None:
    batch = {"x": torch.zeros(3, 2), **({} if targets is None else {"labels": targets})}
    assert ItemCounter().convention(batch) == wanted


def test_a_packed_row_counts_as_one_row() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 0, 1]])
    packed = {"input_ids": torch.ones(1, 6).long(), "position_ids": positions}
    assert rows_of(packed) == 1
    assert rows_of({name: column.repeat(2, 1) for name, column in packed.items()}) == 2
    assert rows_of({"scale": torch.tensor(2.0), "x": torch.zeros(5, 1)}) == 5, "a scalar has no rows"


def test_tensors_are_found_at_any_depth_in_order() -> None:
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    found = tensors_of(({"x": a, "name": "no tensor", "y": [b, None]}, c))
    assert [tensor.shape[0] for tensor in found] == [1, 2, 3]


def test_targets_are_labels_or_the_second_of_a_pair() -> None:
    assert targets_of(BATCH) is LABELS
    assert targets_of((torch.zeros(3), LABELS)) is LABELS
    assert targets_of({"x": LABELS}) is None
    assert targets_of((LABELS, [1, 2])) is None


def test_rows_without_labels_among_rows_with_them_are_an_error() -> None:
    with pytest.raises(DataError, match="Rows without `labels`"):
        ItemCounter().ways["labels"]({"input_ids": LABELS})


def test_a_single_count_from_the_user_applies_to_every_term() -> None:
    assert counts_from_user(3, ["a", "b"]) == {"a": 3, "b": 3}
    assert counts_from_user({"a": torch.tensor(2.5), "b": 0}, ["a", "b"]) == {"a": 2.5, "b": 0}


@pytest.mark.parametrize("counted", [-1, True, float("inf"), float("nan"), "3", None, torch.ones(2)])
def test_a_count_that_is_not_a_valid_number_is_an_error(counted: Any) -> None:
    with pytest.raises(SettingsError, match="must return a finite number of 0 or more for a batch, but returned"):
        counts_from_user(counted, ["loss"])


def test_a_term_missing_from_the_users_count_has_no_items() -> None:
    assert counts_from_user({"a": 1}, ["a", "b"]) == {"a": 1, "b": 0}


def test_counts_of_unknown_terms_are_an_error() -> None:
    with pytest.raises(SettingsError, match=r"counts \['c'\], but the terms of the loss are \['a', 'b'\]"):
        counts_from_user({"a": 1, "b": 2, "c": 3}, ["b", "a"])


def test_relabelling_makes_the_ways_to_count_differ() -> None:
    found = relabelled({"labels": LABELS, "x": 1}, -100)
    assert found is not None
    assert found["x"] == 1
    # Odd rows keep the first label and one more. Even rows keep all, and get a first one.
    assert found["labels"].tolist() == [[5, -100, 7, 8], [4, -100, 4, -100], [6, 3, 2, 9]]
    odd = torch.tensor([[1, 2, 3, 4], [-100, 7, 8, 9]])
    again = relabelled({"labels": odd}, -100)
    assert again is not None
    assert again["labels"].tolist() == [[1, 2, 3, 4], [7, 7, -100, -100]]
    assert odd[1, 0] == -100, "the batch stays as it is"


def test_relabelling_keeps_one_label_in_odd_rows_where_even_rows_have_two() -> None:
    few = torch.tensor([[-100, 2, -100], [-100, -100, 9], [-100, -100, 6], [3, 4, -100]])
    found = relabelled({"labels": few}, -100)
    assert found is not None
    assert found["labels"].tolist() == [[2, 2, -100], [9, -100, -100], [6, -100, 6], [3, -100, -100]]


@pytest.mark.parametrize("batch", [{"x": LABELS}, {"labels": LABELS.float()}, {"labels": LABELS[0]}, (LABELS, LABELS)])
def test_labels_that_cannot_be_ignored_in_part_are_not_relabelled(batch: Any) -> None:
    assert relabelled(batch, -100) is None
