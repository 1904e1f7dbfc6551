"""Columns that disagree with each other or with those of other rows, and columns that some rows lack."""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5ForConditionalGeneration

from heads import CLASSES, HEADS, Row, all_in_float64, one_batch
from lazy_rows import LazyRows

from .case import case, update_error

ODD = 11  # rows that are not in the sample before training
N_ROWS = 100
N_SAMPLE = 24  # where all rows are alike


def with_odd_row(rows: Sequence[Row], change: Callable[[Row], Row]) -> list[Row]:
    return [{**row, **change(row)} if n == ODD else row for n, row in enumerate(rows)]


def error_of(head_name: str, change: Callable[[Row], Row], **arguments: Any) -> float:
    """Return the error of an update with one odd row against the same rows with a correct one."""
    head = HEADS[head_name]
    rows = head.rows(N_ROWS)
    with all_in_float64():
        return update_error(
            head.model(),
            with_odd_row(rows, change),
            lambda model: model(**one_batch(rows)).loss,
            N_ROWS,
            **{"batch_size": 4} | arguments,
        )


@case(3, "a multi-hot vector with one value missing", refused=f"row {ODD} .*'labels' has the shape")
def multi_hot_one_short() -> float:
    head = HEADS["multi-label, BERT"]
    rows = head.rows(N_ROWS)
    return update_error(
        head.model(),
        with_odd_row(rows, lambda row: {"labels": row["labels"][:-1]}),
        lambda model: model(**one_batch(rows)).loss,
        N_ROWS,
        batch_size=4,
    )


@case(3, "a label of a token missing", refused=rf"row {ODD} .*'labels' has the shape .* to match its 'input_ids'")
def token_labels_one_short() -> float:
    return error_of("token classification, BERT", lambda row: {"labels": row["labels"][:-1]})


@case(3, "a label of a token too many", refused=rf"row {ODD} .*'labels' has the shape .* to match its 'input_ids'")
def token_labels_one_long() -> float:
    return error_of("token classification, BERT", lambda row: {"labels": [*row["labels"], 1]})


@case(3, "next tokens one short", refused=rf"row {ODD} .*'labels' has the shape .* to match its 'input_ids'")
def next_tokens_one_short() -> float:
    return error_of("causal LM, Llama", lambda row: {"labels": row["labels"][1:]})


@case(3, "next tokens one short, without padding", refused=rf"row {ODD} .*'labels' has the shape")
def next_tokens_one_short_without_padding() -> float:
    return error_of("causal LM, Llama", lambda row: {"labels": row["labels"][1:]}, padding_free=True)


@case(3, "a mask one short", refused=rf"row {ODD} .*'attention_mask' has the shape .* to match its 'input_ids'")
def mask_one_short() -> float:
    head = HEADS["sequence classification, BERT"]
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in head.rows(N_ROWS)]
    return update_error(
        head.model(),
        with_odd_row(rows, lambda row: {"attention_mask": row["attention_mask"][1:]}),
        lambda model: model(**one_batch(rows)).loss,
        N_ROWS,
        batch_size=4,
    )


@case(3, "an image of another size", refused=rf"row {ODD} .*'pixel_values' has the shape .* as in other rows")
def image_of_another_size() -> float:
    return error_of("image classification, ViT", lambda row: {"pixel_values": row["pixel_values"][:, :-2, :-2]})


@case(3, "a feature missing", refused=rf"row {ODD} .*'features' has the shape \(7,\), but must have \(8,\) as in other")
def feature_missing() -> float:
    torch.manual_seed(0)
    rows = [{"labels": n % CLASSES, "features": torch.randn(8, dtype=torch.float64)} for n in range(N_ROWS)]

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, CLASSES).double()

        def forward(self, features: Tensor) -> Tensor:
            return self.net(features)

    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch["labels"])

    def loss_of_all(model: nn.Module) -> Tensor:
        targets = torch.tensor([row["labels"] for row in rows])
        return F.cross_entropy(model(torch.stack([row["features"] for row in rows])), targets)

    odd = with_odd_row(rows, lambda row: {"features": row["features"][:-1]})
    return update_error(Classifier(), odd, loss_of_all, N_ROWS, loss_fn=loss_fn, batch_size=4)


@case(3, "a target of several missing", refused=rf"row {ODD} .*'labels' has the shape \(2,\)")
def target_missing() -> float:
    head = HEADS["regression, BERT"]
    model = head.model_class(type(head.config)(**{**head.config.to_dict(), "num_labels": 3})).double()
    rows = [{**row, "labels": torch.randn(3, dtype=torch.float64)} for row in head.rows(N_ROWS)]
    return update_error(
        model,
        with_odd_row(rows, lambda row: {"labels": row["labels"][:-1]}),
        lambda model: model(**one_batch(rows)).loss,
        N_ROWS,
        batch_size=4,
    )


@case(3, "a decoder's input one short", refused=rf"row {ODD} .*'decoder_input_ids' has the shape .* match its 'labels'")
def decoder_input_one_short() -> float:
    head = HEADS["seq2seq, T5"]
    rows = [{**row, "decoder_input_ids": [0, *row["labels"][:-1]]} for row in head.rows(N_ROWS)]
    assert issubclass(head.model_class, T5ForConditionalGeneration)
    with all_in_float64():
        return update_error(
            head.model(),
            with_odd_row(rows, lambda row: {"decoder_input_ids": row["decoder_input_ids"][:-1]}),
            lambda model: model(**one_batch(rows)).loss,
            N_ROWS,
            batch_size=4,
        )


class Rater(nn.Module):
    """A model of one value for each token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(61, 8).double(), nn.Linear(8, 1).double()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids)).squeeze(-1)


@case(3, "values along the tokens, padded with −100.0", refused="which this loss does not ignore")
def padded_values() -> float:
    """Train on one value for each token."""

    draw = torch.Generator().manual_seed(0)
    rows = [
        {**row, "labels": torch.randn(len(row["input_ids"]), generator=draw, dtype=torch.float64)}
        for row in HEADS["causal LM, Llama"].rows(N_ROWS)
    ]

    def loss_of_all(model: nn.Module) -> Tensor:
        found = torch.cat([model(torch.tensor(row["input_ids"])) for row in rows])
        return F.mse_loss(found, torch.cat([row["labels"] for row in rows]))

    return update_error(
        Rater(), rows, loss_of_all, N_ROWS, loss_fn=lambda outputs, batch: F.mse_loss(outputs, batch["labels"])
    )


def second_sentences(n_rows: int, having: set[int]) -> tuple[list[Row], list[Row]]:
    """Return rows of which some have `token_type_ids`, and the same rows with the column in all."""
    rows = HEADS["sequence classification, BERT"].rows(n_rows)
    types = [[0, 0] + [int(n in having)] * (len(row["input_ids"]) - 2) for n, row in enumerate(rows)]
    every = [{**row, "token_type_ids": of_row} for row, of_row in zip(rows, types, strict=True)]
    return [every[n] if n in having else row for n, row in enumerate(rows)], every


def error_of_some(as_data: Callable[[list[Row]], Any], n_rows: int, having: set[int], **arguments: Any) -> float:
    some, every = second_sentences(n_rows, having)
    return update_error(
        HEADS["sequence classification, BERT"].model(),
        as_data(some),
        lambda model: model(**one_batch(every)).loss,
        n_rows,
        **{"batch_size": 4} | arguments,
    )


FEW = {17, 130, 200, 399}


@case(4, "token types in 4 of 400 rows", refused="row 17 .*'token_type_ids', but 396 of 400 rows have none")
def token_types_in_few_rows() -> float:
    return error_of_some(list, 400, FEW)


@case(4, "token types in all of 400 rows but 4", refused="row 17 .*'token_type_ids', but 396 of 400 rows have one")
def token_types_in_most_rows() -> float:
    return error_of_some(list, 400, set(range(400)) - FEW)


@case(4, "None for token types in 396 of 400 rows", refused="row 17 .*'token_type_ids', but 396 of 400 rows have none")
def none_for_token_types() -> float:
    def table(rows: list[Row]) -> datasets.Dataset:
        names = ("input_ids", "labels", "token_type_ids")
        return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})

    return error_of_some(table, 400, FEW)


@case(4, "token types in few rows of a torch data set", refused=r"row \d+ .*'token_type_ids', but")
def token_types_in_few_rows_of_a_data_set() -> float:
    return error_of_some(LazyRows, 400, FEW)


@case(4, "token types in few rows of a stream", refused="row 17 .*'token_type_ids', but")
def token_types_in_few_rows_of_a_stream() -> float:
    def stream(rows: list[Row]) -> datasets.IterableDataset:
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    return error_of_some(stream, 400, FEW, max_updates=1)


@case(4, "a name in the inputs of a pair that others lack", refused=f"row {ODD} .*other names")
def names_of_inputs() -> float:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(4, CLASSES).double()

        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            return self.net(x if scale is None else x * scale[:, None])

    draw = torch.Generator().manual_seed(0)
    rows: list[tuple[Row, Tensor]] = [
        ({"x": torch.randn(4, generator=draw, dtype=torch.float64)}, torch.tensor(n % CLASSES)) for n in range(N_ROWS)
    ]
    rows[ODD][0]["scale"] = torch.tensor(3.0, dtype=torch.float64)

    def loss_of_all(model: nn.Module) -> Tensor:
        scale = torch.tensor([3.0 if n == ODD else 1.0 for n in range(N_ROWS)], dtype=torch.float64)
        return F.cross_entropy(model(torch.stack([row["x"] for row, _ in rows]), scale), torch.arange(N_ROWS) % CLASSES)

    return update_error(Scaled(), rows, loss_of_all, N_ROWS, loss_fn=nn.CrossEntropyLoss())


@case(4, "unsigned 16-bit ids and labels")
def unsigned_ids() -> float:
    head = HEADS["causal LM, Llama"]
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in head.rows(N_SAMPLE)]
    narrow = [{key: np.array(value, dtype=np.uint16) for key, value in row.items()} for row in rows]
    with all_in_float64():
        return update_error(head.model(), narrow, lambda model: model(**one_batch(rows)).loss, N_SAMPLE)


@case(3, "an additive mask of its own for each pair of tokens")
def additive_masks() -> float:
    """Check masks with which each token attends to itself and the two tokens before it."""
    head = HEADS["causal LM, Llama"]
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in head.rows(N_SAMPLE)]

    def mask(n: int) -> Tensor:
        seen = torch.ones(n, n).tril().triu(-2)
        return torch.zeros(1, n, n).masked_fill(seen == 0, torch.finfo(torch.float32).min)

    def loss_of_all(model: Any) -> Tensor:
        total, n = torch.zeros((), dtype=torch.float64), 0
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            logits = model(input_ids=ids, attention_mask=mask(ids.shape[1])[None].double()).logits[0, :-1]
            total, n = total + F.cross_entropy(logits, ids[0, 1:], reduction="sum"), n + ids.shape[1] - 1
        return total / n

    with_masks = [{**row, "attention_mask": mask(len(row["input_ids"])).double()} for row in rows]
    with all_in_float64():
        return update_error(head.model(), with_masks, loss_of_all, N_SAMPLE)
