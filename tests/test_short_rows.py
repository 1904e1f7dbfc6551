"""The self-check on rows that are cut to a few tokens: what is cut, what it finds, and when whole rows are measured."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from ftaccum import InexactLossError, InexactLossWarning, test_fine_tuning
from ftaccum.data.columns import ColumnRules, Columns
from ftaccum.data.short_rows import SHORT, cut_row
from ftaccum.objective.self_check import measured_objective
from heads import HEADS, RecordingOptimizer, all_in_float64, one_batch_gradient, relative_error

SMALL: dict[str, Any] = {
    "n_epochs": 1, "validation_split": 0.0, "progress": False, "batch_size": 2, "gradient_accumulation_steps": 4,
}  # fmt: skip


def long_row(n: int, prompt: int, length: int, vocabulary: int = 60) -> dict[str, list[int]]:
    draw = torch.Generator().manual_seed(n)
    ids = torch.randint(3, vocabulary, (length,), generator=draw).tolist()
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


ROWS = [long_row(n, prompt=5 + 3 * (n % 7), length=36 + 5 * (n % 8)) for n in range(16)]
# Of a large vocabulary, so that no rows are measured, whole, for each label.
MANY_LABELS = [long_row(n, prompt=5, length=36 + n, vocabulary=5000) for n in range(40)]
COLUMNS = Columns.of(ROWS, ColumnRules())
LLAMA = HEADS["causal LM, Llama"]


class Chat(nn.Module):
    """A small causal language model with its own loss; subclasses change the loss or what they take."""

    def __init__(self, vocabulary: int = 61) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(vocabulary, 8), nn.Linear(8, vocabulary)
        self.double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> CausalLMOutput:
        logits = self.head(self.embed(input_ids).tanh())
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        return CausalLMOutput(self.loss(losses.view(len(labels), -1), labels[:, 1:], attention_mask), logits)

    def loss(self, losses: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:  # noqa: ARG002
        return losses.sum() / (labels != -100).sum()


class FixedLength(Chat):
    """A model that takes no short rows."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> CausalLMOutput:
        if input_ids.shape[1] <= max(SHORT):
            raise ValueError("too short")
        return super().forward(input_ids, attention_mask, labels)


class Summed(Chat):
    """A model whose loss is a sum divided by the number of rows."""

    def loss(self, losses: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:  # noqa: ARG002
        return losses.sum().square() / len(labels)


class OddBeyond(Chat):
    """A model whose loss is a mean over labels, times a factor of the whole batch for positions after the 20th."""

    def loss(self, losses: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:
        mean = super().loss(losses, labels, attention_mask)
        return mean * (1 + attention_mask[:, 20:].sum() / 100)


@contextmanager
def shapes_of_passes(model: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """Record the shapes of the ids of all forward passes."""
    shapes: list[tuple[int, int]] = []

    def before(_: nn.Module, args: Any, given: dict[str, Any]) -> None:  # noqa: ARG001
        shapes.append(tuple(given["input_ids"].shape))

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    yield shapes
    handle.remove()


@pytest.mark.parametrize("n_tokens", SHORT)
def test_a_cut_row_has_labels_that_count_and_others(n_tokens: int) -> None:
    for row in ROWS:
        cut = cut_row(row, COLUMNS, n_tokens, -100)
        assert cut is not None
        assert len(cut["input_ids"]) == len(cut["labels"]) == n_tokens
        assert -100 in cut["labels"]
        assert any(label != -100 for label in cut["labels"][1:])
        start = next(n for n in range(len(row["labels"])) if row["input_ids"][n : n + n_tokens] == cut["input_ids"])
        assert cut["labels"] == row["labels"][start : start + n_tokens]


def test_a_row_with_labels_at_its_end_is_cut_at_its_start() -> None:
    row = long_row(0, prompt=39, length=40)
    assert cut_row(row, COLUMNS, 9, -100) == {name: values[-9:] for name, values in row.items()}


@pytest.mark.parametrize(
    "changed",
    [
        {"position_ids": list(range(40))},
        {"labels": 3},
        {"labels": [-100] * 40},
        {"labels": [7, *[-100] * 39]},  # a causal model predicts no first token
    ],
)
def test_other_rows_stay_whole(changed: dict[str, Any]) -> None:
    row = long_row(0, prompt=5, length=40) | changed
    assert cut_row(row, Columns.of([row, row], ColumnRules()), 9, -100) is None


def test_only_the_longest_row_is_measured_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, of_check = Chat(5000), list[tuple[int, int]]()

    def watched(*arguments: Any, **named: Any) -> Any:
        shapes.clear()
        objective = measured_objective(*arguments, **named)
        of_check.extend(shapes)
        return objective

    monkeypatch.setattr("ftaccum.training.build_objective.measured_objective", watched)
    with shapes_of_passes(model) as shapes:
        test_fine_tuning(model, train_data=MANY_LABELS, max_updates=1, **SMALL)
    assert of_check[0] == (1, 75)
    assert {width for _, width in of_check[1:]} == {9, 12, 18}


def test_an_update_equals_one_batch_after_a_check_on_cut_rows() -> None:
    with all_in_float64():
        model = LLAMA.model()
        wanted = one_batch_gradient(LLAMA.model(), ROWS[:8])
        recorder = RecordingOptimizer(model)
        test_fine_tuning(model, train_data=ROWS[:8], optimizer=recorder, gradient_clip_norm=None, **SMALL)
    assert relative_error(recorder.gradients[0], wanted) < 1e-12


def test_a_model_that_takes_no_short_rows_is_measured_on_whole_ones() -> None:
    model = FixedLength(5000)
    with shapes_of_passes(model) as shapes:
        test_fine_tuning(model, train_data=MANY_LABELS, max_updates=1, on_inexact="error", **SMALL)
    assert max(width for _, width in shapes) > 36


def test_an_inexact_loss_has_the_message_of_whole_rows() -> None:
    messages: list[str] = []
    for audit in (True, False):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            test_fine_tuning(Summed(5000), train_data=MANY_LABELS, max_updates=1, audit=audit, **SMALL)
        messages += [str(w.message) for w in caught if w.category is InexactLossWarning][:1]
    assert len(set(messages)) == 1 < len(messages)


@pytest.mark.parametrize("audit", [True, False])
def test_a_loss_that_is_odd_only_in_long_rows_is_found(audit: bool) -> None:
    with pytest.raises(InexactLossError):
        test_fine_tuning(OddBeyond(5000), train_data=MANY_LABELS, audit=audit, on_inexact="error", **SMALL)
