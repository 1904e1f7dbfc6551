"""Columns of several texts in a row, with a common prefix such as `chosen_`, each of its own length."""

import datasets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exactness import accumulated_gradients
from ftaccum import DataError, test_fine_tuning
from ftaccum.data.batches import token_counts
from ftaccum.data.columns import Along, ColumnRules, Columns
from ftaccum.data.convert import as_rows
from ftaccum.data.novelty import kinds_of
from ftaccum.data.padding import PaddingCollator
from ftaccum.data.rare_rows import LabelKind, RareRows
from heads import Row, relative_error


def rows_of(*lengths: tuple[int, int]) -> list[Row]:
    """Return rows with a chosen and a rejected text of these lengths."""
    made: list[Row] = []
    for n, m in lengths:
        chosen, rejected = list(range(1, n + 1)), list(range(2, m + 2))
        row = {"chosen_input_ids": chosen, "chosen_attention_mask": [1] * n, "chosen_labels": [-100, *chosen[1:]]}
        made.append({**row, "rejected_input_ids": rejected, "rejected_attention_mask": [1] * m})
    return made


ROWS = rows_of((3, 5), (6, 2), (2, 2), (4, 7), (5, 3))


class Comparer(nn.Module):
    """Compares the mean embeddings of both texts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 4, padding_idx=0)

    def forward(
        self, chosen_input_ids: Tensor, chosen_attention_mask: Tensor, rejected_input_ids: Tensor,
        rejected_attention_mask: Tensor, chosen_labels: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        chosen, rejected = (
            (self.embedding(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            for ids, mask in ((chosen_input_ids, chosen_attention_mask), (rejected_input_ids, rejected_attention_mask))
        )
        counted = (chosen_labels != -100).sum(1)
        return {"loss": ((chosen - rejected).pow(2).sum(1) * counted).mean()}


@pytest.mark.parametrize("left", [False, True])
def test_each_text_is_padded_to_its_longest_row(left: bool) -> None:
    batch = PaddingCollator(ColumnRules(), pad_token_id=9, padding_side="left" if left else "right")(ROWS[:3])
    assert set(batch) == set(ROWS[0])
    for name, values in batch.items():
        fill = 9 if name.endswith("_ids") else -100 if name.endswith("labels") else 0
        width = max(len(row[name]) for row in ROWS[:3])
        for row, found in zip(ROWS[:3], values.tolist(), strict=True):
            padding = [fill] * (width - len(row[name]))
            assert found == (padding + row[name] if left else row[name] + padding)


def test_texts_that_are_equally_long_in_most_rows_still_have_lengths_of_their_own() -> None:
    rows = rows_of(*[(n, n) for n in range(2, 12)], (3, 6))
    columns = Columns.of(rows[:10], ColumnRules())
    assert set(columns.sizes.values()) == {(Along.NOTHING,)}
    assert [len(ids) for ids in columns.tensors(rows)["rejected_input_ids"]][-1] == 6


def test_columns_of_a_text_must_have_one_length() -> None:
    odd = [*ROWS, {**ROWS[0], "rejected_attention_mask": [1, 1]}]
    message = (
        "'rejected_attention_mask' has the shape \\(2,\\), but must have \\(5,\\) to match its 'rejected_input_ids'"
    )
    for data in (odd, datasets.Dataset.from_list(odd)):
        with pytest.raises(DataError, match=f"row 5 cannot be batched.*{message}"):
            test_fine_tuning(Comparer(), train_data=data, validation_split=0.0, progress=False, verbosity="quiet")


@pytest.mark.parametrize("as_table", [False, True])
def test_the_length_of_a_row_is_that_of_its_longest_text(as_table: bool) -> None:
    data = datasets.Dataset.from_list(ROWS) if as_table else ROWS
    assert as_rows(data, "train_data").lengths() == [5, 6, 2, 7, 5]


@pytest.mark.parametrize("as_table", [False, True])
def test_the_tokens_of_all_texts_count(as_table: bool) -> None:
    data = datasets.Dataset.from_list(ROWS * 2) if as_table else ROWS * 2  # 78 tokens in 10 rows
    result = test_fine_tuning(
        Comparer(), train_data=data, validation_split=0.0, tokens_per_update=78, batch_size=10, n_epochs=1,
        planner=False, progress=False, verbosity="quiet",
    )  # fmt: skip
    assert (result.effective_batch_size, result.optimizer_steps) == (10, 1)
    assert result.tokens_per_second is not None
    assert result.padding_fraction == pytest.approx(1 - 78 / (10 * (6 + 7)))
    batch = PaddingCollator(ColumnRules())(ROWS)
    assert token_counts(batch) == (39, batch["chosen_input_ids"].numel() + batch["rejected_input_ids"].numel())


@pytest.mark.parametrize("max_tokens", [100, "auto"])
def test_a_cap_on_tokens_is_refused_for_rows_with_several_texts(max_tokens: int | str) -> None:
    with pytest.raises(DataError, match="Omit `max_tokens`: `batch_size` then limits the rows"):
        test_fine_tuning(Comparer(), train_data=ROWS, validation_split=0.0, max_tokens=max_tokens, verbosity="quiet")


def test_the_gradient_of_rows_with_several_texts_is_that_of_one_batch() -> None:
    model = Comparer().double()
    model(**PaddingCollator(ColumnRules())(ROWS))["loss"].backward()
    assert model.embedding.weight.grad is not None
    expected = {"embedding.weight": model.embedding.weight.grad.clone()}
    for data in (ROWS, datasets.Dataset.from_list(ROWS)):
        found = accumulated_gradients(model, data, batch_size=2, effective_batch_size=5, verbosity="quiet")
        assert relative_error(found[0], expected) < 1e-14


def test_texts_without_masks_get_one_each_that_hides_their_padding() -> None:
    rows: list[Row] = [{name: ids for name, ids in row.items() if "mask" not in name} for row in ROWS]
    model = Comparer().double()
    losses = [  # of each row, which needs no padding
        model(**{name: torch.tensor([values]) for name, values in row.items()})["loss"] for row in ROWS
    ]
    torch.stack(losses).mean().backward()
    assert model.embedding.weight.grad is not None
    expected = {"embedding.weight": model.embedding.weight.grad.clone()}
    for data in (rows, datasets.Dataset.from_list(rows)):
        found = accumulated_gradients(model, data, batch_size=2, effective_batch_size=5, verbosity="quiet")
        assert relative_error(found[0], expected) < 1e-14


@pytest.mark.parametrize("left", [False, True])
def test_a_text_gets_a_mask_only_if_the_model_or_the_loss_takes_it(left: bool) -> None:
    rows: list[Row] = [{"chosen_input_ids": [1, 2], "input_ids": [1]}, {"chosen_input_ids": [1], "input_ids": [1, 2]}]
    one_sided = frozenset({"chosen_input_ids", "input_ids"})
    side = "left" if left else "right"
    for rules in (ColumnRules(), ColumnRules(one_sided | {"chosen_attention_mask"}), ColumnRules(one_sided, True)):
        batch = PaddingCollator(rules, padding_side=side)(rows)
        assert batch["chosen_attention_mask"].tolist() == [[1, 1], [0, 1] if left else [1, 0]]
        assert batch["attention_mask"].tolist() == [[0, 1] if left else [1, 0], [1, 1]]
    assert "chosen_attention_mask" not in PaddingCollator(ColumnRules(one_sided), padding_side=side)(rows)


class Tagger(nn.Module):
    """Predicts a label for each token of its only text, whose columns have a prefix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 7)

    def forward(self, text_input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.embedding(text_input_ids).flatten(0, 1), labels.flatten())}


def tagged(*lengths: int) -> list[Row]:
    return [{"text_input_ids": list(range(n)), "labels": [(n + place) % 7 for place in range(n)]} for n in lengths]


@pytest.mark.parametrize("lengths", [(3, 3, 3, 5, 3, 3), (3, 4, 3, 5, 2, 6)])
def test_labels_run_along_the_tokens_of_the_only_text(lengths: tuple[int, ...]) -> None:
    rows, model = tagged(*lengths), Tagger().double()
    ids, labels = (torch.tensor([[n for row in rows for n in row[name]]]) for name in ("text_input_ids", "labels"))
    model(ids, labels)["loss"].backward()
    assert model.embedding.weight.grad is not None
    expected = {"embedding.weight": model.embedding.weight.grad.clone()}
    found = accumulated_gradients(model, rows, batch_size=2, effective_batch_size=6, verbosity="quiet")
    assert relative_error(found[0], expected) < 1e-14


def test_the_error_names_labels_that_are_longer_than_the_only_text() -> None:
    rows = tagged(3, 4, 3, 5)
    rows[2]["labels"].append(1)
    message = "row 2 .*'labels' has the shape \\(4,\\), but must have \\(3,\\) to match its 'text_input_ids'"
    for data in (rows, datasets.Dataset.from_list(rows)):
        with pytest.raises(DataError, match=message):
            test_fine_tuning(Tagger(), train_data=data, validation_split=0.0, progress=False, verbosity="quiet")


def test_the_tokens_of_several_texts_are_no_kinds_of_rows() -> None:
    rows = [{**row, "labels": n % 2} for n, row in enumerate(ROWS)]
    assert kinds_of(PaddingCollator(ColumnRules())(rows)).keys() == {"labels"}
    chosen = RareRows.of(as_rows(rows, "train_data"), -100, LabelKind())
    assert len(chosen.positions) == 2, "a row for each label, and none for a token"
