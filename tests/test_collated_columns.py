"""Columns of collated batches besides token ids and labels: how they are trimmed, padded and joined."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftaccum import DataError, ExactAccumulation, PaddingWarning
from ftaccum.bridges.window_width import at_one_width
from ftaccum.data.batches import join, trimmed
from ftaccum.runtime.process_group import SINGLE
from heads import HEADS, Row, one_batch, relative_error

TOKENS = HEADS["token classification, BERT"]
FILL = {"input_ids": 0, "labels": -100}


def masked(lengths: list[int], width: int, **columns: Any) -> dict[str, Tensor]:
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": 5 * mask, "attention_mask": mask, **columns}


def along(batch: dict[str, Tensor], value: float, fill: float) -> Tensor:
    return torch.where(batch["attention_mask"] == 1, torch.tensor(value), torch.tensor(fill))


def test_columns_with_one_value_at_padding_are_trimmed() -> None:
    batch = masked([2, 3], 5)
    batch |= {"tags": along(batch, 1, -1), "weights": along(batch, 1.0, 0.0)}
    batch["boxes"] = batch["weights"][..., None].repeat(1, 1, 4)
    assert {name: value.shape[1] for name, value in trimmed(batch).items()} == dict.fromkeys(batch, 3)


def test_features_that_have_the_width_of_the_tokens_by_chance_are_not_trimmed() -> None:
    batch = masked([2, 3], 5, features=torch.arange(10.0).reshape(2, 5), pairs=torch.zeros(2, 5, 5))
    found = trimmed(batch)
    assert found["input_ids"].shape == (2, 3)
    assert torch.equal(found["features"], batch["features"])
    assert torch.equal(found["pairs"], batch["pairs"])
    assert trimmed(batch, along={"features"})["features"].shape == (2, 3)


def test_columns_are_padded_with_the_value_that_the_collator_uses() -> None:
    narrow, wide = masked([2, 3], 3), masked([4], 4)
    for batch in (narrow, wide):
        batch |= {"tags": along(batch, 1, -1), "weights": along(batch, 1.0, 0.5), "labels": along(batch, 1, -7)}
    joined = join([narrow, wide], FILL)
    assert joined is not None
    assert joined["tags"].tolist() == [[1, 1, -1, -1], [1, 1, 1, -1], [1, 1, 1, 1]]
    assert joined["weights"].tolist() == [[1, 1, 0.5, 0.5], [1, 1, 1, 0.5], [1, 1, 1, 1]]
    assert joined["labels"][:, 3].tolist() == [-7, -7, 1]


def test_columns_with_ignored_labels_and_columns_named_like_labels_are_padded_with_them() -> None:
    one = masked([3], 3, tags=torch.tensor([[1, -100, 1]]), token_labels=torch.ones(1, 3).long())
    other = masked([4], 4, tags=torch.tensor([[1, 1, 1, 1]]), token_labels=torch.ones(1, 4).long())
    joined = join([one, other], FILL)
    assert joined is not None
    assert joined["tags"][0].tolist() == [1, -100, 1, -100]
    assert joined["token_labels"][0].tolist() == [1, 1, 1, -100]


def test_labels_as_wide_as_other_inputs_by_chance_keep_their_own_padding() -> None:
    one = masked([2], 3, labels=torch.tensor([[4, -100, 7]]))
    other = masked([4], 4, labels=torch.tensor([[4, 5, 6, 7]]))
    joined = join([one, other], FILL)
    assert joined is not None
    assert joined["labels"][0].tolist() == [4, -100, 7, -100]


def test_columns_of_unknown_padding_are_not_joined_and_named_where_one_width_is_needed() -> None:
    batches = [masked([n], n, tags=torch.ones(1, n).long()) for n in (3, 4)]
    assert join(batches, FILL) is None
    with pytest.raises(DataError, match=r"unknown what pads the column 'tags'.*Pad all batches to one length"):
        at_one_width(batches, FILL, SINGLE)
    shown = masked([2], 3)
    shown["tags"] = along(shown, 1, -1)
    assert [batch["tags"].tolist() for batch in at_one_width([*batches, shown], FILL, SINGLE)] == [
        [[1, 1, 1, -1]], [[1, 1, 1, 1]], [[1, 1, -1, -1]],
    ]  # fmt: skip


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = TOKENS.model()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits


def tagged(rows: list[Row]) -> dict[str, Tensor]:
    """Collate rows with the column `tags` instead of `labels`, and weights of tokens."""
    batch = one_batch(rows)
    batch["loss_mask"] = batch["attention_mask"].double() / (1 + batch["input_ids"] % 3)
    batch["tags"] = batch.pop("labels")
    return batch


def test_a_loop_with_other_columns_along_the_tokens_is_exact_and_raises_no_false_alarm() -> None:
    def loss_fn(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        losses = F.cross_entropy(logits.transpose(1, 2), batch["tags"], reduction="none")
        return (losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()

    rows, model = [{**row, "labels": [t % 3 for t in row["input_ids"]]} for row in TOKENS.rows(8)], Tagger()
    batch = tagged(rows)
    loss_fn(model(batch["input_ids"], batch["attention_mask"]), batch).backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    accumulation = ExactAccumulation(
        model, loss_fn=loss_fn, count_items=lambda batch: batch["loss_mask"].sum(), on_inexact="error"
    )
    accumulation.backward([tagged(rows[n : n + 2]) for n in range(0, 8, 2)])
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert relative_error(found, wanted) < 1e-9  # type: ignore[arg-type]
    assert [audit["error"] < 1e-9 for audit in accumulation.audits] == [True]


class LastState(nn.Module):
    """A classifier whose result depends on the padding after the tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.rnn = nn.Embedding(9, 4).double(), nn.LSTM(4, 5, batch_first=True).double()
        self.classes = nn.Linear(5, 3).double()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.classes(self.rnn(self.table(input_ids))[0][:, -1])


def without_mask(lengths: list[int]) -> tuple[Tensor, Tensor]:
    batch = masked(lengths, max(lengths))
    ids = batch["attention_mask"] * (1 + torch.arange(max(lengths)) + torch.tensor(lengths)[:, None]) % 9
    return ids, torch.tensor(lengths) % 3


def as_dict(pair: tuple[Tensor, Tensor]) -> Any:
    return {"input_ids": pair[0], "labels": pair[1]}


def as_pair_of_dict(pair: tuple[Tensor, Tensor]) -> Any:
    return {"input_ids": pair[0]}, pair[1]


@pytest.mark.parametrize("form", [tuple, as_dict, as_pair_of_dict])
def test_padding_without_a_mask_is_measured_and_rows_get_one_width(form: Any) -> None:
    model, lengths = LastState(), [2, 3, 1, 5, 4, 2, 3, 4]
    ids, labels = without_mask(lengths)
    F.cross_entropy(model(ids), labels).backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    def loss_fn(logits: Tensor, targets: Any) -> Tensor:
        return F.cross_entropy(logits, targets if isinstance(targets, Tensor) else targets["labels"])

    accumulation = ExactAccumulation(model, loss_fn=loss_fn)
    with pytest.warns(PaddingWarning, match="Padding counts"):
        accumulation.backward([form(without_mask(lengths[n : n + 2])) for n in range(0, 8, 2)])
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert relative_error(found, wanted) < 1e-12  # type: ignore[arg-type]
