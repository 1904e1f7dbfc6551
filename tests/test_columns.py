"""The columns of a batch: which are padded, which are stacked, and which row is wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from exactness import accumulated_gradients
from ftaccum import DataError, plan, test_fine_tuning
from ftaccum.data.columns import Along, ColumnRules, Columns
from ftaccum.data.convert import as_rows
from ftaccum.data.documents import first_restart, is_packed, starts_of
from ftaccum.data.packing import PackingCollator
from ftaccum.data.padding import PaddingCollator
from ftaccum.data.scan import look_at_columns
from ftaccum.data.values import OddRowError
from heads import HEADS, Row, all_in_float64, relative_error
from lazy_rows import LazyRows
from silent_errors.columns import Rater
from silent_errors.packed import causal_lm, documents, packed

TOKENS, TARGETS, NOTHING = (Along.TOKENS,), (Along.TARGETS,), (Along.NOTHING,)
CLASSIFIER, CAUSAL = HEADS["sequence classification, BERT"], HEADS["causal LM, Llama"]


def sizes(rows: Sequence[Row], **rules: Any) -> dict[str, Any]:
    return Columns.of(rows, ColumnRules(**rules)).sizes


def rows_of(*lengths: int, **columns: Any) -> list[Row]:
    """Return rows of these numbers of tokens. The other columns are functions of the length."""
    return [{"input_ids": list(range(n)), **{name: make(n) for name, make in columns.items()}} for n in lengths]


def test_a_dimension_follows_the_tokens_or_has_a_fixed_size() -> None:
    rows = rows_of(3, 4, 6, bbox=lambda n: [[0] * 4] * n, labels=lambda _: 1, grid=lambda n: torch.zeros(3, n))
    assert sizes(rows) == {"input_ids": TOKENS, "bbox": (Along.TOKENS, 4), "labels": (), "grid": (3, Along.TOKENS)}


def test_the_majority_of_rows_decides_the_shape_of_a_column() -> None:
    rows = rows_of(3, 4, 6, 5, labels=lambda n: [1] * (n - (n == 4)), classes=lambda n: [1.0] * (3 - (n == 6)))
    assert sizes(rows, own_targets=False) == {"input_ids": TOKENS, "labels": TOKENS, "classes": (3,)}
    assert sizes(rows) == sizes(rows, own_targets=False), "what is along the tokens in most rows is no other's length"


@pytest.mark.parametrize("name", ["labels", "decoder_input_ids", "input_features", "feature_mask"])
def test_these_columns_may_have_their_own_length(name: str) -> None:
    rows = rows_of(3, 4, 6, **{name: lambda n: [n] * (17 % n)})
    assert sizes(rows)[name] == NOTHING


def test_labels_of_one_size_in_most_rows_have_a_fixed_size() -> None:
    rows = [{"x": [0.5] * 4, "labels": [0, 1, 1][n // 7 :]} for n in range(9)]
    assert sizes(rows)["labels"] == (3,)
    assert sizes(rows, own_targets=True)["labels"] == NOTHING, "as of an encoder-decoder"


def test_decoder_inputs_follow_the_length_of_the_labels() -> None:
    rows = rows_of(3, 4, 6, labels=lambda n: [1] * (n * 2 % 7 + 1), decoder_input_ids=lambda n: [0] * (n * 2 % 7 + 1))
    assert sizes(rows)["decoder_input_ids"] == TARGETS
    with pytest.raises(OddRowError, match=r"'decoder_input_ids' has the shape \(4,\), but must have \(6,\) .*'labels'"):
        Columns.of(rows, ColumnRules()).tensors([{**rows[2], "decoder_input_ids": [0] * 4}])


def test_rows_without_input_ids_count_tokens_by_another_column() -> None:
    sounds = [{"input_values": torch.zeros(n), "labels": [1] * (9 - n)} for n in (3, 4, 6)]
    assert sizes(sounds) == {"input_values": TOKENS, "labels": NOTHING}
    embedded = [{"inputs_embeds": torch.zeros(n, 2), "attention_mask": [1] * n} for n in (3, 4, 6)]
    assert sizes(embedded) == {"inputs_embeds": (Along.TOKENS, 2), "attention_mask": TOKENS}
    assert sizes([{"words": [1] * n, "labels": 1} for n in (3, 4, 6)]) == {"words": TOKENS, "labels": ()}


def test_embeddings_get_an_attention_mask_like_input_ids() -> None:
    batch = PaddingCollator(ColumnRules())([{"inputs_embeds": torch.ones(n, 2)} for n in (1, 3)])
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]


def test_wide_unsigned_integers_become_int64() -> None:
    for dtype in (np.uint16, np.uint32, np.uint64):
        rows: list[Row] = [{"input_ids": np.arange(3, dtype=dtype), "weight": np.ones((), dtype=dtype)}]
        batch = PaddingCollator(ColumnRules())(rows)
        assert {column.dtype for column in batch.values()} == {torch.int64}
        (inputs, targets) = PaddingCollator(ColumnRules())([(np.arange(3, dtype=dtype), dtype(2))])
        assert inputs.dtype == targets.dtype == torch.int64


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_masked_in_masks_of_token_pairs(left: bool) -> None:
    real, padding = (1, 0) if left else (0, 2)
    for mask, hidden in ((torch.full((1, 2, 2), 0.5), torch.finfo().min), (torch.ones(1, 2, 2).bool(), 0)):
        collator = PaddingCollator(ColumnRules(), padding_side="left" if left else "right")
        longer = {"input_ids": [1, 2, 3], "attention_mask": mask.new_ones(1, 3, 3)}
        found = collator([{"input_ids": [1, 2], "attention_mask": mask}, longer])["attention_mask"][0, 0]
        assert found[real, padding] == hidden
        assert found[padding].tolist() == [0.0 if mask.is_floating_point() else True] * 3, "padding looks anywhere"


def test_a_column_missing_in_a_late_row_loses_no_earlier_update(tmp_path: Path) -> None:
    rows = [{**row, "token_type_ids": [0] * len(row["input_ids"])} for row in CLASSIFIER.rows(100)]
    del rows[11]["token_type_ids"]
    with pytest.raises(DataError, match="row 11 cannot be batched: it has no value in its column"):
        test_fine_tuning(
            CLASSIFIER.model(),
            train_data=LazyRows(rows),
            validation_split=0.0,
            output_dir=str(tmp_path),
            progress=False,
        )
    assert (tmp_path / "ledger.jsonl").read_text()


def test_rows_left_out_of_a_table_are_not_checked() -> None:
    table = datasets.Dataset.from_dict(
        {"input_ids": [[1, 2], [1, 2, 3], [4], [5, 6]], "labels": [[1, 2], [1], [4], [5, 6]], "weight": [1, None, 1, 1]}
    )
    rules = ColumnRules(own_targets=False)
    for sound in (table.select([0, 2, 3]), table.filter(lambda row: row["weight"]).shuffle(seed=0)):
        assert look_at_columns(as_rows(sound, "train_data"), rules, range(3)) is not None
    part = as_rows(table, "train_data").subset([3, 2, 0])
    assert look_at_columns(part, rules, range(3)) is not None
    with pytest.raises(DataError, match=r"row 1 .* 'weight', but 3 of 4 rows have one"):
        look_at_columns(as_rows(table, "train_data"), rules, range(3))
    with pytest.raises(DataError, match=r"row 1 .* 'labels' has the shape \(1,\), but .* \(3,\) .*\(1 of 4 rows\)"):
        look_at_columns(as_rows(table.remove_columns("weight"), "train_data"), rules, range(3))


def test_columns_of_none_or_text_are_ignored() -> None:
    rows = [{**row, "token_type_ids": None, "text": "a" if n % 2 else None} for n, row in enumerate(CLASSIFIER.rows(4))]
    assert (
        look_at_columns(as_rows(rows, "train_data"), ColumnRules(frozenset({"token_type_ids"})), range(4)) is not None
    )
    assert sizes(rows) == {"input_ids": TOKENS, "labels": ()}


def test_columns_only_in_the_validation_rows_are_ignored() -> None:
    rows = CLASSIFIER.rows()
    given = {
        "batch_size": 3,
        "n_epochs": 1,
        "progress": False,
        "loss_fn": lambda outputs, batch: F.cross_entropy(outputs.logits, batch["labels"]),
    }
    more = [{**row, "number": n} for n, row in enumerate(rows)]
    with_numbers = test_fine_tuning(CLASSIFIER.model(), train_data=rows, val_data=more, **given)
    assert (
        with_numbers.final_loss
        == test_fine_tuning(CLASSIFIER.model(), train_data=rows, val_data=rows, **given).final_loss
    )


def test_values_per_token_are_accepted_if_the_loss_ignores_padding() -> None:
    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        used = batch["attention_mask"] == 1
        return F.mse_loss(outputs[used], batch["labels"][used])

    rows = [{**row, "labels": torch.tensor(row["input_ids"]).double().sin()} for row in CAUSAL.rows(6)]
    found = accumulated_gradients(Rater(), rows, loss_fn=loss_fn, effective_batch_size=6, batch_size=2)
    model = Rater()
    all_found = torch.cat([model(torch.tensor(row["input_ids"])) for row in rows])
    F.mse_loss(all_found, torch.cat([row["labels"] for row in rows])).backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert relative_error(found[0], wanted) < 1e-10


def test_positions_mark_where_documents_begin() -> None:
    assert starts_of(torch.tensor([0, 1, 0, 0, 1, 2])).tolist() == [True, False, True, True, False, False]
    assert first_restart(torch.tensor([0, 1, 2, 0, 1])) == 3
    assert [is_packed(torch.tensor(p)) for p in ([], [0], [0, 1, 2], [5, 6], [0, 0], [0, 1, 0])] == [False] * 4 + [
        True
    ] * 2


@pytest.mark.parametrize("batch_size", [1, 3])
def test_windows_of_packed_rows_equal_those_of_their_documents(batch_size: int) -> None:
    """Seven ragged rows make a window of four and a remainder of three. Each loss is a mean over their documents."""
    every = documents()
    order = [window.rows for window in plan(7, n_epochs=1, validation_split=0.0, effective_batch_size=4).windows(0)]
    with all_in_float64():
        found = accumulated_gradients(
            causal_lm(), [packed(row, list) for row in every], batch_size=batch_size, effective_batch_size=4, n_epochs=1
        )
        for gradient, window in zip(found, order, strict=True):
            model = causal_lm()
            alone = [torch.tensor([document]) for n in window for document in every[n]]
            losses = [F.cross_entropy(model(input_ids=d).logits[0, :-1], d[0, 1:], reduction="sum") for d in alone]
            (torch.stack(losses).sum() / sum(d.shape[1] - 1 for d in alone)).backward()
            wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            assert relative_error(gradient, wanted) < 1e-10


def test_packed_rows_are_announced(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [packed(row, list) for row in documents()]
    test_fine_tuning(causal_lm(), train_data=rows, n_epochs=1, validation_split=0.0, progress=False)
    assert "Rows: packed; `position_ids` keep their documents apart" in capsys.readouterr().out


def test_positions_that_jump_are_refused_among_packed_rows() -> None:
    collator = PaddingCollator(ColumnRules())
    jumping, restarting = ({"input_ids": [1, 2, 3], "position_ids": places} for places in ([0, 1, 5], [0, 1, 0]))
    assert "attention_mask" in collator([jumping, jumping])
    assert "attention_mask" not in collator([restarting, restarting])
    with pytest.raises(OddRowError, match="its `position_ids` jump at token 2"):
        collator([restarting, jumping])


@pytest.mark.slow
def test_positions_that_do_not_restart_change_nothing() -> None:
    rows = CAUSAL.rows(7)
    numbered = [{**row, "position_ids": list(range(len(row["input_ids"])))} for row in rows]
    plain, with_positions, without_padding = (
        accumulated_gradients(CAUSAL.model(), data, effective_batch_size=7, batch_size=3, **more)[0]
        for data, more in ((rows, {}), (numbered, {}), (numbered, {"padding_free": True}))
    )
    assert relative_error(with_positions, plain) < 1e-6
    assert relative_error(without_padding, plain) < 1e-6


def test_a_text_whose_positions_restart_is_accepted_with_a_mask() -> None:
    """BERT does not support packed rows: it uses positions as they are, with and without a mask."""
    rows = [{**row, "position_ids": [n % 3 for n in range(len(row["input_ids"]))]} for row in CLASSIFIER.rows(6)]
    with pytest.raises(DataError, match="If the row is really a single text, give it an `attention_mask` of ones"):
        accumulated_gradients(CLASSIFIER.model(), rows, effective_batch_size=6)
    masked = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    assert accumulated_gradients(CLASSIFIER.model(), masked, effective_batch_size=6)


def test_rows_with_masks_or_other_numbers_of_labels_are_not_concatenated() -> None:
    collator = PackingCollator(-100)
    plain = {"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 1], "position_ids": [0, 1]}
    assert collator([plain])["input_ids"].tolist() == [[1, 2]]
    for change, words in (
        ({"labels": [1]}, "2 tokens but 1 `labels`"),
        ({"attention_mask": [1, 0]}, "its `attention_mask` has other values"),
        ({"position_ids": [0, 0]}, "its `position_ids` has other values"),
    ):
        with pytest.raises(OddRowError, match=words) as caught:
            collator([plain, {**plain, **change}])
        assert caught.value.place == 1
