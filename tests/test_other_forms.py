"""Other forms of rows, labels, losses and models: each works, or the message names a form that does."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    PatchTSTConfig,
    PatchTSTForPrediction,
    PatchTSTForPretraining,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from ftaccum import DataError, InexactLossWarning, Result, SettingsError, test_fine_tuning
from heads import HEADS, Row
from lazy_rows import LazyRows

CLASSIFIER, CAUSAL = HEADS["sequence classification, BERT"], HEADS["causal LM, Llama"]
TOKENS = HEADS["token classification, BERT"]
SIZE = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def run(model: nn.Module, data: Any, **arguments: Any) -> Result:
    defaults = {
        "n_epochs": 1, "validation_split": 0.0, "batch_size": 2, "effective_batch_size": 5, "audit": False,
        "progress": False,
    }  # fmt: skip
    return test_fine_tuning(model, train_data=data, **(defaults | arguments))


def plain(n: int = 10) -> list[Row]:
    return [{"input_ids": list(row["input_ids"]), "labels": int(row["labels"])} for row in CLASSIFIER.rows(n)]


def bert(**settings: Any) -> Any:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=61, **SIZE, **WITHOUT_DROPOUT, num_labels=3, **settings))


ROWS = plain()


@functools.cache
def wanted() -> list[float]:
    """Return the losses of a run on `ROWS`."""
    return run(CLASSIFIER.model(), ROWS).loss_history


# --- tables and columns


def columns(rows: list[Row]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.parametrize(
    "data",
    [
        pd.DataFrame(ROWS),
        pd.DataFrame(ROWS, index=range(90, 100)),
        pd.DataFrame(
            {"input_ids": [torch.tensor(row["input_ids"]) for row in ROWS], "labels": columns(ROWS)["labels"]}
        ),
        pa.Table.from_pylist(ROWS),
        columns(ROWS),
        BatchEncoding(columns(ROWS)),
        {"input_ids": columns(ROWS)["input_ids"], "label": np.array(columns(ROWS)["labels"])},
        {"input_ids": columns(ROWS)["input_ids"], "label": torch.tensor(columns(ROWS)["labels"])},
        {"input_ids": pd.Series(columns(ROWS)["input_ids"]), "label": pd.Series(columns(ROWS)["labels"])},
    ],
    ids=range(9),
)
def test_tables_and_columns_are_rows(data: Any) -> None:
    assert run(CLASSIFIER.model(), data).loss_history == wanted()


@pytest.mark.slow
def test_columns_of_arrays_are_rows() -> None:
    ids = np.arange(50).reshape(10, 5)
    rows = [{"input_ids": row, "labels": n % 3} for n, row in enumerate(ids)]
    data = {"input_ids": torch.from_numpy(ids), "labels": np.arange(10) % 3}
    assert run(CLASSIFIER.model(), data).loss_history == run(CLASSIFIER.model(), rows).loss_history


def test_rows_of_a_dataframe_are_named_by_position() -> None:
    frame = pd.DataFrame(ROWS, index=range(90, 100))
    frame.loc[93, "labels"] = 7
    with pytest.raises(DataError, match="In `val_data`, row 3 has the label 7"):
        run(CLASSIFIER.model(), ROWS, val_data=frame)


# --- rows with an extra dimension


def nested(rows: list[Row]) -> list[Row]:
    return [{"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([row["labels"]])} for row in rows]


@pytest.mark.parametrize(
    "data",
    [
        nested(ROWS),
        [BatchEncoding(row) for row in nested(ROWS)],
        [{**row, "input_ids": [row["input_ids"]]} for row in ROWS],
        LazyRows(nested(ROWS)),
        Dataset.from_list([{**row, "input_ids": [row["input_ids"]]} for row in ROWS]),
        Dataset.from_list([{**row, "input_ids": [row["input_ids"]]} for row in ROWS]).with_format("torch"),
        Dataset.from_list(ROWS).with_transform(
            lambda batch: {"input_ids": [torch.tensor([ids]) for ids in batch["input_ids"]], "labels": batch["labels"]}
        ),
    ],
    ids=range(7),
)
def test_rows_made_with_return_tensors_train_like_those_without(data: Any) -> None:
    assert run(CLASSIFIER.model(), data).loss_history == pytest.approx(wanted(), rel=1e-6)


def test_lengths_of_rows_with_an_extra_dimension_are_known() -> None:
    for data in (nested(ROWS), Dataset.from_list([{**row, "input_ids": [row["input_ids"]]} for row in ROWS])):
        assert run(CLASSIFIER.model(), data, max_tokens=16, batch_size=4).optimizer_steps


def test_token_labels_lose_the_extra_dimension_too() -> None:
    rows = [{"input_ids": list(row["input_ids"]), "labels": list(row["labels"])} for row in CAUSAL.rows()]
    both = [{name: [value] for name, value in row.items()} for row in rows]
    assert run(CAUSAL.model(), both).loss_history == run(CAUSAL.model(), rows).loss_history


@pytest.mark.slow
def test_a_stream_of_rows_with_an_extra_dimension() -> None:
    def of(rows: list[Row]) -> IterableDataset:
        return IterableDataset.from_generator(lambda: iter(rows))

    found = run(CLASSIFIER.model(), of(nested(ROWS)), max_updates=2)
    assert found.loss_history == pytest.approx(run(CLASSIFIER.model(), of(ROWS), max_updates=2).loss_history, rel=1e-6)


def test_choices_keep_their_dimension() -> None:
    choices = HEADS["multiple choice, BERT"]
    assert run(choices.model(), choices.rows()).optimizer_steps


def test_images_with_an_extra_dimension_are_refused_with_a_remedy() -> None:
    images = HEADS["image classification, ViT"]
    rows = [{**row, "pixel_values": torch.as_tensor(row["pixel_values"])[None]} for row in images.rows()]
    with pytest.raises(DataError, match=r"\['pixel_values'\] of the row begin with a dimension of 1.*`column\[0\]`"):
        run(images.model(), rows)


# --- labels


def named_labels() -> Any:
    return bert(label2id={"a": 0, "b": 1, "c": 2}, id2label={0: "a", 1: "b", 2: "c"})


SPLIT = {"validation_split": 0.3, "n_epochs": 2}


@functools.cache
def of_numbers() -> Result:
    return run(named_labels(), ROWS, **SPLIT)


@pytest.mark.parametrize(
    "form", [list, Dataset.from_list, pytest.param(LazyRows, marks=pytest.mark.slow), pd.DataFrame]
)
def test_labels_that_are_strings_become_numbers(form: Callable[[list[Row]], Any]) -> None:
    found = run(named_labels(), form([{**row, "labels": "abc"[row["labels"]]} for row in ROWS]), **SPLIT)
    assert found.loss_history == pytest.approx(of_numbers().loss_history, rel=1e-6)
    assert found.val_loss_history == pytest.approx(of_numbers().val_loss_history, rel=1e-6)
    odd = form([{**row, "labels": "z" if n == 7 else "a"} for n, row in enumerate(ROWS)])
    with pytest.raises(DataError, match=r"row 7 .*label 'z', but the model's config.label2id knows \['a', 'b', 'c'\]"):
        run(named_labels(), odd)


def test_labels_of_tokens_may_be_strings() -> None:
    model = TOKENS.model()
    rows = [{name: list(value) for name, value in row.items()} for row in TOKENS.rows()]
    rows = [{**row, "labels": [max(0, label) for label in row["labels"]]} for row in rows]
    named = [{**row, "labels": [f"LABEL_{label}" for label in row["labels"]]} for row in rows]
    assert run(model, named).loss_history == run(TOKENS.model(), rows).loss_history


@functools.cache
def of_integers() -> list[float]:
    return run(bert(), [{**row, "labels": int(row["labels"] > 0)} for row in ROWS]).loss_history


@pytest.mark.parametrize("kind", [bool, np.bool_, torch.tensor, np.int8])
def test_booleans_and_narrow_integers_are_classes(kind: Callable[[Any], Any]) -> None:
    rows = [{**row, "labels": row["labels"] > 0} for row in ROWS]
    found = run(bert(), [{**row, "labels": kind(row["labels"])} for row in rows]).loss_history
    assert found == of_integers()


def hot(row: Row, kind: Callable[[bool], Any]) -> list[Any]:
    return [kind(row["labels"] == n) for n in range(3)]


def several_labels() -> Any:
    return bert(problem_type="multi_label_classification")


@functools.cache
def of_floats() -> list[float]:
    return run(several_labels(), [{**row, "labels": hot(row, float)} for row in ROWS]).loss_history


def tensors(rows: list[Row]) -> list[Row]:
    return [{**row, "labels": torch.tensor(row["labels"])} for row in rows]


@pytest.mark.parametrize("form", [list, tensors, Dataset.from_list, pytest.param(LazyRows, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [int, bool])
def test_whole_numbers_for_several_labels_at_once_are_floats(kind: Any, form: Callable[[list[Row]], Any]) -> None:
    rows = form([{**row, "labels": hot(row, kind)} for row in ROWS])
    assert run(several_labels(), rows).loss_history == pytest.approx(of_floats(), rel=1e-6)


@pytest.mark.parametrize("kind", [int, bool])
def test_without_a_problem_type_the_message_names_it(kind: Any) -> None:
    rows = [{**row, "labels": hot(row, kind)} for row in ROWS]
    with pytest.raises(DataError, match=r"`model.config.problem_type = 'multi_label_classification'`|as 0.0 and 1.0"):
        run(bert(), rows)
    model = bert()
    model.config.problem_type = "multi_label_classification"
    assert run(model, rows).optimizer_steps


@pytest.mark.parametrize("kind", [int, bool])
def test_a_binary_cross_entropy_given_by_the_user_asks_for_floats(kind: Any) -> None:
    rows = [(torch.randn(4), torch.tensor(hot(row, kind))) for row in ROWS]
    with pytest.raises(DataError, match=r"compares floats, but the labels are integers or booleans\."):
        run(nn.Linear(4, 3), rows, loss_fn=nn.BCEWithLogitsLoss())
    assert run(nn.Linear(4, 3), [(x, y.float()) for x, y in rows], loss_fn=nn.BCEWithLogitsLoss()).optimizer_steps


def test_a_loss_given_by_the_user_gets_booleans_unchanged() -> None:
    kinds: list[torch.dtype] = []

    def loss_fn(outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        kinds.append(batch["labels"].dtype)
        return F.cross_entropy(outputs.logits, batch["labels"].long())

    run(bert(), [{**row, "labels": row["labels"] > 0} for row in ROWS], loss_fn=loss_fn)
    assert set(kinds) == {torch.bool}


# --- losses


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        pytest.param(nn.CrossEntropyLoss(label_smoothing=0.1), marks=pytest.mark.slow),
        F.cross_entropy,
    ],
)
def test_a_loss_of_two_tensors_on_a_models_outputs(loss: Any) -> None:
    words = r"compares two tensors, .*`loss_fn=lambda outputs, batch: loss\(outputs.logits, batch\['labels'\]\)`"
    with pytest.raises(DataError, match=words):
        run(bert(), ROWS, loss_fn=loss)
    assert run(bert(), ROWS, loss_fn=lambda outputs, batch: loss(outputs.logits, batch["labels"])).optimizer_steps
    pairs = [(torch.tensor(row["input_ids"][:3]), torch.tensor(row["labels"])) for row in ROWS]
    with pytest.raises(DataError, match=r"`loss_fn=lambda outputs, targets: loss\(outputs.logits, targets\)`"):
        run(bert(), pairs, loss_fn=loss)
    assert run(bert(), pairs, loss_fn=lambda outputs, targets: loss(outputs.logits, targets)).optimizer_steps


def test_a_loss_of_two_tensors_on_tokens() -> None:
    loss = nn.CrossEntropyLoss()
    words = r"loss\(outputs.logits.flatten\(0, 1\), batch\['labels'\].flatten\(\)\)`, .* or leave `loss_fn` out"
    with pytest.raises(DataError, match=words):
        run(TOKENS.model(), TOKENS.rows(), loss_fn=loss)
    found = run(
        TOKENS.model(), TOKENS.rows(),
        loss_fn=lambda outputs, batch: loss(outputs.logits.flatten(0, 1), batch["labels"].flatten()),
    )  # fmt: skip
    assert found.loss_history == pytest.approx(run(TOKENS.model(), TOKENS.rows()).loss_history, rel=1e-6)


def test_a_language_model_is_not_advised_to_drop_the_shift() -> None:
    with pytest.raises(DataError, match=r"leave `loss_fn` out") as caught:
        run(CAUSAL.model(), CAUSAL.rows(), loss_fn=nn.CrossEntropyLoss())
    assert "flatten" not in str(caught.value)


# --- models


def test_weights_on_the_meta_device_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 3)
    with pytest.raises(SettingsError, match="`model` has weights on the meta device, which are shapes without numbers"):
        run(model, [(torch.randn(4), torch.tensor(0))] * 4, loss_fn=nn.CrossEntropyLoss())


def masked_images() -> tuple[nn.Module, list[Row]]:
    decoder = {f"decoder_{name}": value for name, value in SIZE.items()}
    model = ViTMAEForPreTraining(ViTMAEConfig(**SIZE, **decoder, image_size=8, patch_size=2))
    return model, [{"pixel_values": torch.randn(3, 8, 8)} for _ in range(6)]


SERIES = {
    "num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4, "d_model": 8, "ffn_dim": 8,
    "num_attention_heads": 2, "num_hidden_layers": 1, "prediction_length": 4, "norm_type": "layernorm",
}  # fmt: skip


def series() -> tuple[nn.Module, list[Row]]:
    rows = [{"past_values": torch.randn(16, 2), "future_values": torch.randn(4, 2)} for _ in range(6)]
    return PatchTSTForPrediction(PatchTSTConfig(**SERIES)), rows


def masked_series() -> tuple[nn.Module, list[Row]]:
    rows = [{"past_values": torch.randn(16, 2)} for _ in range(6)]
    return PatchTSTForPretraining(PatchTSTConfig(**SERIES, do_mask_input=True)), rows


def images_and_texts() -> tuple[nn.Module, list[Row]]:
    text = {**SIZE, "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 2}
    vision = {**SIZE, "image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    rows = [{"input_ids": torch.randint(3, 19, (5,)), "pixel_values": torch.randn(3, 8, 8)} for _ in range(6)]
    return model, rows


@pytest.mark.parametrize(
    ("make", "on_inexact"),
    [(masked_images, "error"), (masked_series, "error"), (series, "error"), (images_and_texts, "ignore")],
)
def test_models_without_labels_train_as_the_message_advises(
    make: Callable[[], tuple[nn.Module, list[Row]]], on_inexact: str
) -> None:
    model, rows = make()
    remedy = r"for a model that computes its loss without labels, `loss_fn=lambda outputs, batch: outputs\.loss`"
    with pytest.raises(DataError, match=remedy):
        run(model, rows)
    before = [p.clone() for p in model.parameters()]
    result = run(
        model, rows,
        loss_fn=lambda outputs, _: outputs.loss, batch_size=3, effective_batch_size=6, on_inexact=on_inexact,
    )  # fmt: skip
    assert result.optimizer_steps == 1
    assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_rows_that_are_compared_with_each_other_are_reported() -> None:
    model, rows = images_and_texts()
    with pytest.warns(InexactLossWarning, match="rows are compared with each other, as in-batch negatives are"):
        run(model, rows, loss_fn=lambda outputs, _: outputs.loss)
