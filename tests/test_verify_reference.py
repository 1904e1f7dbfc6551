"""The reference of `verify`: one batch without any inferred counts, and the choice of its rows."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn

from ftaccum import DataError, Verification, verify
from ftaccum.apps.verify.plain_collation import PlainCollator, documents_of
from ftaccum.apps.verify.rare_rows import rarest, traits_of, with_rare_rows
from ftaccum.apps.verify.reference import Reference
from ftaccum.data.collator import RowCollator
from ftaccum.data.convert import as_rows
from ftaccum.objective.model_forward import ModelForward
from heads import HEADS, all_in_float64, one_batch, one_batch_gradient, relative_error
from lazy_rows import LazyRows

CPU = torch.device("cpu")


def reference(model: nn.Module, rows: list[Any], **components: Any) -> Reference:
    absent = dict.fromkeys(("data_collator", "loss_fn", "count_items", "tokenizer"))
    given = {
        "model": model,
        "reduction": "mean",
        "pad_token_id": 0,
        "padding_side": "right",
        "configuration": SimpleNamespace(),
        "ignore_index": -100,
    }
    return Reference(SimpleNamespace(**absent | given | components), as_rows(rows, "data"), (0, 0), CPU)  # type: ignore[arg-type]


def gradient_of(of: Reference, positions: range) -> dict[str, Tensor]:
    model = of.components.model
    model.zero_grad()
    of.loss(of.batch(positions)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "name", ["causal LM, GPT-2", "multiple choice, BERT", "seq2seq, BART", "image classification, ViT"]
)
def test_the_reference_is_the_gradient_of_one_batch(name: str) -> None:
    model, rows = HEADS[name].model().train(), HEADS[name].rows()
    wanted = one_batch_gradient(model, rows)
    assert relative_error(gradient_of(reference(model, rows), range(len(rows))), wanted) < 1e-14


def test_documents_of_a_packed_row_are_run_separately() -> None:
    head = HEADS["causal LM, Llama"]
    model, documents = head.model().train(), head.rows(6)
    packed = []
    for first, second in zip(documents[::2], documents[1::2], strict=True):
        row = {name: [*first[name], *second[name]] for name in first}
        packed.append({**row, "position_ids": [n for d in (first, second) for n in range(len(d["input_ids"]))]})
    with all_in_float64():
        wanted = one_batch_gradient(model, documents)
        found = gradient_of(reference(model, packed), range(3))
    assert relative_error(found, wanted) < 1e-14
    assert documents_of(packed[0])[1]["labels"].tolist() == documents[1]["labels"]
    with_mask = {**packed[0], "attention_mask": [1] * len(packed[0]["input_ids"])}
    assert documents_of(with_mask) == [with_mask], "the user has said what sees what"


def test_a_sum_is_divided_by_the_items_that_the_loss_counted() -> None:
    class Ignoring(nn.Linear):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            labels[labels == 2] = -100
            return {"loss": F.cross_entropy(super().forward(x), labels, reduction="sum")}

    model, draw = Ignoring(4, 3), torch.Generator().manual_seed(0)
    rows = [{"x": torch.randn(4, generator=draw), "labels": n % 3} for n in range(9)]
    seen = [row for row in rows if row["labels"] != 2]
    logits = F.linear(torch.stack([row["x"] for row in seen]), model.weight, model.bias)
    wanted = F.cross_entropy(logits, torch.tensor([row["labels"] for row in seen]))
    for count_items in (None, lambda batch: (batch["labels"] != -100).sum()):
        of = reference(model, rows, reduction="sum", count_items=count_items)
        torch.testing.assert_close(of.loss(of.batch(range(9))), wanted)


def test_terms_without_items_are_left_out() -> None:
    def loss_fn(outputs: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"y": F.cross_entropy(outputs, batch["y"]), "z": F.cross_entropy(outputs, batch["z"])}

    model = nn.Linear(4, 3)
    model.forward = lambda x: F.linear(x, model.weight, model.bias)  # type: ignore[method-assign]
    of = reference(model, [{"x": torch.ones(4), "y": 1, "z": -100}] * 2, loss_fn=loss_fn)
    assert of.loss(of.batch(range(2))).item() == pytest.approx(
        F.cross_entropy(model(torch.ones(1, 4)), torch.tensor([1])).item()
    )


def test_a_loss_that_cannot_be_identified_is_refused() -> None:
    class Several(nn.Linear):
        def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
            loss = F.cross_entropy(super().forward(x), labels)
            return loss, 2 * loss

    of = reference(Several(4, 3), [{"x": torch.ones(4), "labels": 1}] * 2)
    with pytest.raises(DataError, match="with 2 scalars, so its loss cannot be identified"):
        of.loss(of.batch(range(2)))


def test_rows_without_loss_items_are_reported() -> None:
    head = HEADS["token classification, BERT"]
    rows = [row if n == 1 else {**row, "labels": [-100] * len(row["labels"])} for n, row in enumerate(head.rows(30))]
    with pytest.raises(DataError, match=r"The loss of the 2 rows of an update in one batch is nan"):
        verify(head.model(), LazyRows(rows * 9), batch_size=2, progress=False)


def test_columns_are_padded_as_heads_want_them() -> None:
    rows = HEADS["token classification, BERT"].rows(4)
    plain, wanted = PlainCollator(None)(rows), one_batch(rows)
    assert plain.keys() == wanted.keys()
    assert all(torch.equal(plain[name], wanted[name]) for name in plain)
    left, wanted = PlainCollator(None, on_the_left=True)(rows), one_batch(rows, left=True)
    assert all(torch.equal(left[name], wanted[name]) for name in left)


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ({"labels": [1.0, 0.0, 1.0]}, {"labels": [1.0, 0.0]}, r"'labels' has rows of the shapes \[\(2,\), \(3,\)\]"),
        ({"x": torch.ones(2, 8, 8)}, {"x": torch.ones(2, 6, 8)}, "does not run along the tokens"),
        ({"token_type_ids": [0, 1]}, {}, "Only some of the rows have numbers in the column 'token_type_ids'"),
    ],
)
def test_columns_that_disagree_are_refused(one: dict[str, Any], other: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        PlainCollator(None)([{"input_ids": [3, 4], **one}, {"input_ids": [3, 4, 5, 6], **other}])


def test_rare_rows_take_up_to_a_quarter_of_the_window() -> None:
    rows = [{"x": n, "labels": n % 2} for n in range(100)]
    rows[40]["labels"], rows[41]["labels"], rows[42] = 2, 2, {**rows[42], "box": [1.0]}
    rows[43] = {**rows[43], "labels": 5}
    traits = traits_of(as_rows(rows, "data"))
    window = with_rare_rows(tuple(range(12)), traits, 0)
    assert len(window) == 12
    assert set(window) - set(range(12)) == {40, 42, 43}
    assert len(set(with_rare_rows(tuple(range(4)), traits, 0)) - set(range(4))) == 1
    assert with_rare_rows((7,), traits, 0) == (7,)
    assert with_rare_rows((40, 42, 43, 1), traits, 0) == (40, 42, 43, 1), "nothing is missing"
    assert rarest(traits, 1) == [42]


def test_rare_rows_are_found_in_tables_tuples_and_token_labels() -> None:
    table = Dataset.from_list(
        [{"input_ids": [n], "labels": n % 2, "box": [1.0] if n == 7 else None} for n in range(20)]
    )
    assert 7 in with_rare_rows(tuple(range(4)), traits_of(as_rows(table, "data").subset(range(20))), 0)
    pairs = [(torch.ones(2), torch.tensor(3 if n == 7 else n % 2)) for n in range(20)]
    assert 7 in with_rare_rows(tuple(range(4)), traits_of(as_rows(pairs, "data")), 0)
    tags = [{"input_ids": [1, 2], "labels": [0, 9 if n == 7 else 1]} for n in range(20)]
    assert 7 in with_rare_rows(tuple(range(4)), traits_of(as_rows(tags, "data")), 0)
    short = [{"input_ids": [1, 2], "labels": [1.0, 0.0][: 1 if n == 7 else 2]} for n in range(20)]
    assert 7 in with_rare_rows(tuple(range(4)), traits_of(as_rows(short, "data")), 0)
    measures = [{"input_ids": [1, 2], "labels": n + 0.5} for n in range(20)]
    assert with_rare_rows(tuple(range(4)), traits_of(as_rows(measures, "data")), 0) == tuple(range(4))


@pytest.mark.parametrize("seed", [0, 3, 21, 36])  # of the model: seeds 21 and 36 give two rows nearly the same loss
def test_a_rare_row_far_from_the_sample_is_in_the_update(seed: int) -> None:
    rows = [({"x": torch.ones(4) * (n % 7)}, 2 if n == 2900 else n % 2) for n in range(3000)]
    found = verify_weighted(rows, torch.tensor([1.0, 1.0, 50.0]), seed)
    assert found.exact  # the weight of its class has been measured
    assert "Replaced 1 of the rows by rows with rare label values or columns." in found.notes


@pytest.mark.parametrize("seed", range(4))  # with some seeds, the first measured row has zero weight
def test_a_class_that_weighs_nothing_is_measured(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    classes = torch.multinomial(torch.tensor([0.4, 0.5, 0.1]), 600, replacement=True, generator=draw)
    rows = [({"x": torch.randn(4, generator=draw)}, int(label)) for label in classes]
    assert verify_weighted(rows, torch.tensor([1.0, 0.0, 5.0]), seed).exact


def test_a_weight_too_small_to_measure_is_reported() -> None:
    """A tiny weight is not 0: a window of such rows alone has a gradient of full size."""
    draw = torch.Generator().manual_seed(0)
    classes = torch.multinomial(torch.tensor([0.4, 0.3, 0.3]), 600, replacement=True, generator=draw)
    rows = [({"x": torch.randn(4, generator=draw)}, int(label)) for label in classes]
    found = verify_weighted(rows, torch.tensor([1.0, 1.0, 1e-6]), 0)
    assert not found.exact
    assert "row" in found.reasons[0]


def verify_weighted(rows: Sequence[Any], weight: Tensor, seed: int) -> Verification:
    """Verify a linear classifier of three classes whose loss function weights them."""
    torch.manual_seed(seed)
    model = nn.Linear(4, 3)
    model.forward = lambda x: F.linear(x, model.weight, model.bias)  # type: ignore[method-assign]
    loss_fn = lambda outputs, y: F.cross_entropy(outputs, y, weight=weight.to(outputs.dtype))
    return verify(model, rows, loss_fn=loss_fn, batch_size=2, effective_batch_size=8, progress=False)


@pytest.mark.slow
def test_faults_of_batches_and_of_the_forward_pass_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cut has these faults, so comparing cuts would not find them."""
    head, sizes = HEADS["token classification, BERT"], {"batch_size": 3, "effective_batch_size": 11, "progress": False}
    collate, outputs = RowCollator.__call__, ModelForward._outputs

    def with_padding_as_labels(*arguments: Any, **named: Any) -> dict[str, Tensor]:
        batch = collate(*arguments, **named)
        return {**batch, "labels": batch["labels"].masked_fill(batch["attention_mask"] == 0, 0)}

    def without_mask(self: ModelForward, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        return outputs(self, model, {name: value for name, value in batch.items() if name != "attention_mask"})

    for owner, name, faulty in (
        (RowCollator, "__call__", with_padding_as_labels),
        (ModelForward, "_outputs", without_mask),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, faulty)
            assert not verify(head.model(), head.rows(30), **sizes).exact
