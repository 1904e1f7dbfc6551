"""Numbers out of range are named: before training if the column can be examined, otherwise when they come."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from ftaccum import DataError, Result, plan, test_fine_tuning
from ftaccum.data.dataset import Rows
from ftaccum.data.probe_rows import sample_positions
from heads import HEADS, Row
from lazy_rows import LazyRows
from slow_parameters import FAST_HEADS, some_slow

CLASSIFIER = HEADS["sequence classification, BERT"]
N_ROWS = 100
SIZE = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 61}


def run(model: nn.Module, data: Any, **arguments: Any) -> Result:
    defaults = {
        "n_epochs": 1, "validation_split": 0.0, "batch_size": 2, "effective_batch_size": 5, "audit": False,
        "progress": False,
    }  # fmt: skip
    return test_fine_tuning(model, train_data=data, **(defaults | arguments))


class Shop(nn.Module):
    """A model of a table with numbers and categories."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.city, self.kind, self.head = nn.Embedding(5, 4), nn.Embedding(3, 4), nn.Linear(4, 3)

    def forward(self, city: Tensor, kinds: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.city(city) + self.kind(kinds[:, 1]))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def plain(n: int = N_ROWS) -> list[Row]:
    return [{"input_ids": list(row["input_ids"]), "labels": int(row["labels"])} for row in CLASSIFIER.rows(n)]


def with_types() -> list[Row]:
    return [{**row, "token_type_ids": [0] * len(row["input_ids"])} for row in plain()]


def with_positions() -> list[Row]:
    return [{**row, "position_ids": list(range(len(row["input_ids"])))} for row in plain()]


def multi_hot() -> list[Row]:
    return [{**row, "labels": [float(row["labels"] == n) for n in range(3)]} for row in plain()]


def shop() -> list[Row]:
    return [{"city": n % 5, "kinds": [9, n % 3], "labels": n % 3} for n in range(N_ROWS)]


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**SIZE, num_labels=3, max_position_embeddings=32))


def roberta() -> nn.Module:
    config = RobertaConfig(**SIZE, num_labels=3, max_position_embeddings=34, pad_token_id=1, type_vocab_size=1)
    return RobertaForSequenceClassification(config)


def t5() -> nn.Module:
    return HEADS["seq2seq, T5"].model()


def bart() -> nn.Module:
    return HEADS["seq2seq, BART"].model()


def pairs() -> list[Row]:
    return [{"input_ids": row["input_ids"], "labels": [5, 6, 7][: 1 + n % 3]} for n, row in enumerate(plain())]


LONG = {"input_ids": [5] * 33}
FAULTS: list[tuple[Callable[[], nn.Module], Callable[[], list[Row]], Row, str]] = [
    (bert, plain, {"input_ids": [5, 61]}, "has the token id 61, but the model's vocabulary is 0 to 60"),
    (bert, plain, {"input_ids": [5, -1]}, "has the token id -1"),
    (bert, plain, {"labels": 3}, "has the label 3, but the model has 3 classes, 0 to 2"),
    (bert, plain, LONG, "has 33 tokens, but the model has positions for 32. Truncate the row"),
    (roberta, plain, LONG, "has 33 tokens, but the model has positions for 32. Truncate the row"),
    (bert, with_types, {"input_ids": [5, 6], "token_type_ids": [0, 2]}, "number 2 in `token_type_ids`, but the model"),
    (bert, with_positions, {"input_ids": [5, 6], "position_ids": [0, 32]}, "has the number 32 in `position_ids`"),
    (bert, multi_hot, {"labels": [1.0, 2.0, 0.0]}, "label 2.0, but the loss is a binary cross entropy, whose labels"),
    (bert, multi_hot, {"labels": [1.0, -100.0, 0.0]}, "has the label -100.0, but the loss is a binary cross entropy"),
    (t5, pairs, {"labels": [5, 61]}, "has the label 61, but the model has 61 classes"),
    (bart, pairs, {"labels": [5, 61]}, "has the label 61, but the model has 61 classes"),
    (Shop, shop, {"city": 5}, "number 5 in `city`, but the model has 5 embeddings for it, 0 to 4. Fix the row"),
    (Shop, shop, {"kinds": [9, 3]}, "number 3 in element 1 of `kinds`, but the model has 3 embeddings for it"),
]

ALIKE: list[Row] = [{"input_ids": [5, -1]}, {"labels": [1.0, -100.0, 0.0]}]  # another fault is found in the same place


def faulty(rows: list[Row], change: Row, first: int = 0) -> tuple[list[Row], int, int]:
    """Return rows with a fault in one that is not examined before training, its index, and the index of its update.

    Args:
        first: The first row that may have the fault.
    """
    seen = sample_positions(Rows("train_data", rows))
    windows = plan(len(rows), n_epochs=1, validation_split=0.0, effective_batch_size=5).windows(0)
    update, index = next(
        (n, row)
        for n, window in enumerate(windows)
        for row in window.rows
        if n > 2 and row >= first and row not in seen
    )
    return [{**row, **change} if n == index else row for n, row in enumerate(rows)], index, update


@pytest.mark.parametrize(
    ("model", "rows", "change", "words"),
    [pytest.param(*f, marks=pytest.mark.slow) if f[0] is bart or f[2] in ALIKE else f for f in FAULTS],
)
def test_a_bad_row_far_from_the_start_is_named(
    model: Callable[[], nn.Module],
    rows: Callable[[], list[Row]],
    change: Row,
    words: str,
    tmp_path: Path,
) -> None:
    data, index, _ = faulty(rows(), change)
    arrays = [{name: np.asarray(value) for name, value in row.items()} for row in data]
    for form in (data, arrays, Dataset.from_list(data), Dataset.from_list(data).with_format("torch")):
        with pytest.raises(DataError, match=rf"In `train_data`, row {index} .*{words}"):
            run(model(), form, output_dir=str(tmp_path / "before"))
    assert not (tmp_path / "before" / "ledger.jsonl").exists()
    more, index_of_more, update = faulty(rows() * 3, change, first=256)  # as many rows are examined before training
    with pytest.raises(DataError, match=rf"In `train_data`, row {index_of_more} .*{words}"):
        run(model(), LazyRows(more), output_dir=str(tmp_path / "run"))
    entries = (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()
    assert sum("window" in json.loads(entry) for entry in entries) == update
    with pytest.raises(DataError, match=rf"In `val_data`, row {index} .*{words}"):
        run(model(), rows(), val_data=data)
    with pytest.raises(DataError, match=rf"In `train_data`, row {index} .*{words}"):
        run(model(), data, validation_split=0.3)


@pytest.mark.parametrize("loss_fn", [nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits])
def test_targets_of_a_binary_cross_entropy_are_probabilities(loss_fn: Any) -> None:
    rows = [(torch.randn(4), torch.tensor([0.0, 0.3, 2.0 if n == 77 else 1.0])) for n in range(N_ROWS)]
    with pytest.raises(DataError, match=r"In `train_data`, row 77 has the label 2\.0, but the loss is a binary"):
        run(nn.Linear(4, 3), rows, loss_fn=loss_fn)
    assert run(nn.Linear(4, 3), rows[:77], loss_fn=loss_fn).optimizer_steps
    assert run(nn.Linear(4, 3), rows, loss_fn=nn.MSELoss()).optimizer_steps


def test_a_collator_may_repair_what_rows_have() -> None:
    def truncating(rows: list[Row]) -> dict[str, Tensor]:
        ids = torch.tensor([(row["input_ids"] * 8)[:8] for row in rows]) % 61
        return {"input_ids": ids, "labels": torch.tensor([row["labels"] for row in rows])}

    rows = [*plain(50), {"input_ids": [70] * 99, "labels": 1}]
    assert run(bert(), rows, data_collator=truncating).optimizer_steps


class Cutting(nn.Module):
    """A model that takes rows of any length and reads their first tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(61, 4), nn.Embedding(8, 4), nn.Linear(4, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        input_ids = input_ids[:, :8]
        positions = torch.arange(input_ids.shape[1])
        logits = self.head((self.tokens(input_ids) + self.positions(positions)).mean(1))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("form", [list, LazyRows])
def test_a_model_that_truncates_its_rows_takes_long_ones(form: Callable[[list[Row]], Any]) -> None:
    assert run(Cutting(), form([*plain(60), {**LONG, "labels": 1}]), on_inexact="ignore").optimizer_steps


class Masked(BertForSequenceClassification):
    """A model whose loss ignores labels of -1."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> Any:
        outputs = super().forward(input_ids, attention_mask=attention_mask)
        if labels is not None:
            known = (labels != -1).float()
            losses = F.binary_cross_entropy_with_logits(outputs.logits, labels, reduction="none")
            outputs.loss = (losses * known).mean()
        return outputs


def test_a_loss_that_ignores_some_labels_may_have_them() -> None:
    config = BertConfig(**SIZE, num_labels=3, max_position_embeddings=32, problem_type="multi_label_classification")
    rows = [{**row, "labels": [1.0, -1.0, 0.0] if n % 9 == 4 else [1.0, 0.0, 0.0]} for n, row in enumerate(plain())]
    assert run(Masked(config), rows).optimizer_steps


def test_probabilities_may_be_rounded() -> None:
    rows = [{**row, "labels": [1.0000002, 0.0, -1e-7]} for row in plain()]
    assert run(bert(), rows).optimizer_steps


@pytest.mark.parametrize("name", some_slow(HEADS, FAST_HEADS))
def test_every_head_takes_its_rows(name: str) -> None:
    assert run(HEADS[name].model(), HEADS[name].rows(), on_inexact="ignore").optimizer_steps


class Kernels(TorchDispatchMode):
    """A recorder of indices out of range in kernels. On a GPU, one of them makes the device unusable."""

    def __init__(self) -> None:
        super().__init__()
        self.in_range: list[bool] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if operation in (aten.embedding.default, aten.gather.default, aten.nll_loss_forward.default):
            sizes = {aten.embedding.default: lambda: len(args[0]), aten.gather.default: lambda: args[0].shape[args[1]]}
            size = sizes.get(operation, lambda: args[0].shape[-1])()
            indices = args[2] if operation is aten.gather.default else args[1]
            self.in_range.append(bool((((indices >= 0) & (indices < size)) | (indices == -100)).all()))
        return operation(*args, **(kwargs or {}))


def widths_of(model: nn.Module) -> list[int]:
    """Return a list to which each batch of the model adds its width."""
    widths: list[int] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        widths.append((args[0] if args else kwargs["input_ids"]).shape[-1])

    model.register_forward_pre_hook(note, with_kwargs=True)
    return widths


@pytest.mark.parametrize("make", [bert, roberta, Cutting])
def test_no_pass_is_wider_than_the_rows(make: Callable[[], nn.Module]) -> None:
    model, rows = make(), [{"input_ids": [5, 6, 7, 8][: 2 + n % 3], "labels": n % 3} for n in range(20)]
    widths = widths_of(model)
    run(model, rows, on_inexact="ignore")
    assert max(widths) == 4


@pytest.mark.parametrize("make", [bert, roberta])
@pytest.mark.parametrize("form", [list, LazyRows])
def test_a_long_row_is_refused_without_a_lookup_out_of_range(
    make: Callable[[], nn.Module], form: Callable[[list[Row]], Any]
) -> None:
    kernels = Kernels()
    with kernels, pytest.raises(DataError, match="row 60 has 40 tokens, but the model has positions for 32"):
        run(make(), form([*plain(60), {"input_ids": [5] * 40, "labels": 1}]))
    assert all(kernels.in_range)


@pytest.mark.parametrize(("change", "words"), [({"city": 5}, "the number 5 in `city`"), ({"labels": 3}, "the label 3")])
def test_a_number_out_of_range_in_every_row_reaches_no_kernel(change: Row, words: str) -> None:
    kernels = Kernels()
    with kernels, pytest.raises(DataError, match=f"row 0 has {words}"):
        run(Shop(), [{**row, **change} for row in shop()])
    assert all(kernels.in_range)


def test_a_model_that_clamps_positions_takes_a_long_row_during_a_run() -> None:
    class Clamping(Cutting):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            positions = torch.arange(input_ids.shape[1]).clamp(max=7)
            logits = self.head((self.tokens(input_ids) + self.positions(positions)).mean(1))
            return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}

    rows, _, _ = faulty([{"input_ids": [5, 6], "labels": n % 3} for n in range(3 * N_ROWS)], LONG, first=256)
    assert run(Clamping(), LazyRows(rows), on_inexact="ignore").optimizer_steps
