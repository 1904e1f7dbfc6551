"""The self-check on rows that are cut to a few tokens: what is cut, what it finds, and when whole rows are measured."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from ftaccum import DataError, InexactLossError, InexactLossWarning, plan, test_fine_tuning
from ftaccum.data.columns import ColumnRules, Columns
from ftaccum.data.short_rows import SHORT, cut_row
from ftaccum.objective.self_check import measured_objective
from heads import HEADS, RecordingOptimizer, all_in_float64, one_batch, one_batch_gradient, relative_error

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


@pytest.fixture
def of_check(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list that gets the shapes of the ids of all forward passes of the self-check."""
    shapes: list[tuple[int, int]] = []

    def watched(model: nn.Module, *arguments: Any, **named: Any) -> Any:
        handle = model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            return measured_objective(model, *arguments, **named)
        finally:
            handle.remove()

    def before(_: nn.Module, __: Any, given: dict[str, Any]) -> None:
        shapes.append(tuple(given["input_ids"].shape))

    monkeypatch.setattr("ftaccum.training.build_objective.measured_objective", watched)
    return shapes


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


def test_only_the_longest_row_and_rare_ones_are_measured_whole(of_check: list[tuple[int, int]]) -> None:
    test_fine_tuning(Chat(5000), train_data=MANY_LABELS, max_updates=1, **SMALL)
    assert of_check[0] == (1, 75)
    assert {width for _, width in of_check[1:]} == {9, 12, 18}


def test_an_update_equals_one_batch_after_a_check_on_cut_rows(of_check: list[tuple[int, int]]) -> None:
    with all_in_float64():
        model = LLAMA.model()
        wanted = one_batch_gradient(LLAMA.model(), ROWS[:8])
        recorder = RecordingOptimizer(model)
        test_fine_tuning(model, train_data=ROWS[:8], optimizer=recorder, gradient_clip_norm=None, **SMALL)
    assert (4, 18) in of_check
    assert relative_error(recorder.gradients[0], wanted) < 1e-12


def test_a_model_that_takes_no_short_rows_is_measured_on_whole_ones(of_check: list[tuple[int, int]]) -> None:
    test_fine_tuning(FixedLength(5000), train_data=MANY_LABELS, max_updates=1, on_inexact="error", **SMALL)
    assert max(width for rows, width in of_check if rows == 4) > 36


@pytest.mark.parametrize("kind", [Chat, FixedLength])
@pytest.mark.parametrize("column", ["input_ids", "labels"])
def test_a_number_out_of_range_after_the_cut_is_refused(kind: type[Chat], column: str) -> None:
    rows = [*ROWS, {name: list(values) for name, values in ROWS[0].items()}]
    rows[-1][column][-1] = 61
    with pytest.raises(DataError, match="row 16"):
        test_fine_tuning(kind(), train_data=rows, **SMALL)


def test_a_collator_may_have_an_attribute_named_cut(of_check: list[tuple[int, int]]) -> None:
    class Collator:
        cut = width = 512

        def __call__(self, rows: list[Any]) -> dict[str, Tensor]:
            return one_batch(rows)

    test_fine_tuning(Chat(), train_data=ROWS, data_collator=Collator(), max_updates=1, **SMALL)
    assert min(width for _, width in of_check) > 32


def test_an_inexact_loss_has_the_message_of_whole_rows() -> None:
    found = []
    for audit in (True, False):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            test_fine_tuning(Summed(5000), train_data=MANY_LABELS, max_updates=1, audit=audit, **SMALL)
        messages = [str(each.message) for each in caught if each.category is InexactLossWarning]
        found.append([message for message in messages if "audit" not in message.lower()])
    assert found[0] == found[1]
    assert len(found[0]) == 1


class PoolsBeyond(Chat):
    """A model that reads a mean over the width of a batch beyond the 45th position, padding included."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> CausalLMOutput:
        beyond = self.embed(input_ids[:, 45:]).sum(1, keepdim=True) / max(1, input_ids.shape[1] - 45)
        logits = self.head(self.embed(input_ids).tanh() + beyond)
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        return CausalLMOutput(self.loss(losses.view(len(labels), -1), labels[:, 1:], attention_mask), logits)


@pytest.mark.parametrize("seed", range(3))
def test_padding_that_matters_only_in_long_rows_is_found(seed: int) -> None:
    rows = [long_row(n, prompt=5, length=40 if n % 16 else 58, vocabulary=5000) for n in range(64)]
    model = PoolsBeyond(5000)
    recorder = RecordingOptimizer(model)
    test_fine_tuning(model, train_data=rows, optimizer=recorder, gradient_clip_norm=None, random_seed=seed, **SMALL)
    windows = plan(64, batch_size=2, gradient_accumulation_steps=4, n_epochs=1, validation_split=0, random_seed=seed)
    for window, found in zip(windows.windows(0), recorder.gradients, strict=True):
        wanted = one_batch_gradient(PoolsBeyond(5000), [rows[n] for n in window.rows])
        assert relative_error(found, wanted) < 1e-12


class Switches(Chat):
    """A model that replaces a submodule when it gets short rows, which whole ones do not fit."""

    def __init__(self, vocabulary: int = 61) -> None:
        super().__init__(vocabulary)
        self.middle = nn.Linear(8, 8).double()
        self.kind = "long"

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> CausalLMOutput:
        if input_ids.shape[1] <= 32 and self.kind == "long":
            self.kind, self.middle = "short", nn.Identity()
        assert isinstance(self.middle, nn.Linear) == (self.kind == "long")
        return super().forward(input_ids, attention_mask, labels)


def test_a_submodule_that_short_rows_replace_is_restored() -> None:
    model = Switches(5000)
    middle = model.middle
    test_fine_tuning(model, train_data=MANY_LABELS, max_updates=1, **SMALL)
    assert model.middle is middle


def test_rows_with_padding_stay_whole() -> None:
    row = long_row(0, prompt=5, length=40) | {"attention_mask": [1] * 36 + [0] * 4}
    assert cut_row(row, Columns.of([row, row], ColumnRules()), 9, -100) is None


def test_labels_may_be_on_a_device() -> None:
    class OnDevice(Tensor):
        def __array__(self, *_: Any) -> Any:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

    row = long_row(0, prompt=5, length=40)
    row_of_tensors = {name: torch.tensor(values).as_subclass(OnDevice) for name, values in row.items()}
    cut = cut_row(row_of_tensors, COLUMNS, 9, -100)
    assert cut is not None
    assert cut["labels"].tolist() == cut_row(row, COLUMNS, 9, -100)["labels"]


@pytest.mark.parametrize("audit", [True, False])
def test_a_loss_that_is_odd_only_in_long_rows_is_found(audit: bool) -> None:
    with pytest.raises(InexactLossError):
        test_fine_tuning(OddBeyond(5000), train_data=MANY_LABELS, audit=audit, on_inexact="error", **SMALL)
