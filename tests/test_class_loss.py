"""`class_weights` and `label_smoothing`: the gradients and losses of torch's cross entropy over one batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from exactness import accumulated_gradients, windows_of
from ftaccum import CheckpointError, SettingsError, test_fine_tuning, verify
from ftaccum.apps.options import OPTIONS
from ftaccum.apps.parser import parse
from ftaccum.apps.search.settings import reserved
from ftaccum.arguments import parse_settings
from ftaccum.objective.cross_entropy import CrossEntropy
from ftaccum.objective.objective import Objective
from ftaccum.objective.self_check import measured_objective
from heads import CLASSES, HEADS, IGNORED, Head, Row, all_in_float64, one_batch, relative_error

WEIGHTS = [0.5, 3.0, 1.25]
# 13 rows in windows of 5: micro-batches of 2, 2 and 1 rows, and a remainder of 3 rows.
SIZES: dict[str, Any] = {"batch_size": 2, "effective_batch_size": 5, "planner": False}
ROWS, TAGS, IMAGES = "sequence classification, BERT", "token classification, BERT", "image classification, ViT"
CAUSAL, SUMMARIES = "causal LM, Llama", "seq2seq, BART"


def unequal_rows(head: Head, n: int = 13) -> list[Row]:
    """Return rows of which most labels are 0, in classification."""
    rows = head.rows(n)
    for place, row in enumerate(rows):
        if isinstance(row["labels"], int):
            row["labels"] = [1, 0, 0, 0, 2, 0][place % 6]
    return rows


def balanced(rows: Sequence[Row]) -> list[float]:
    labels = np.concatenate([np.ravel(row["labels"]) for row in rows])
    return compute_class_weight("balanced", classes=np.arange(CLASSES), y=labels[labels != IGNORED]).tolist()


def one_batch_loss(model: nn.Module, rows: Sequence[Row], weights: Any, smoothing: float, *, shifts: bool) -> Tensor:
    """Return torch's loss of all rows in one batch; the model gets labels only if it makes inputs from them."""
    batch = one_batch(rows)
    labels = batch["labels"] if model.config.is_encoder_decoder else batch.pop("labels")
    logits = model(**batch).logits
    if shifts:
        logits, labels = logits[:, :-1], labels[:, 1:]
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), weight, label_smoothing=smoothing)


def largest_error(name: str, rows: list[Row], given: Any, weights: Any, smoothing: float, **more: Any) -> float:
    """Return the largest relative error of a window's gradient, against plain PyTorch."""
    model, wanted = HEADS[name].model(), []
    with all_in_float64():
        for window in windows_of(rows, **SIZES):
            one_batch_loss(model.train(), window, weights, smoothing, shifts="causal" in name).backward()
            wanted.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            model.zero_grad()
        arguments = SIZES | {"class_weights": given, "label_smoothing": smoothing, "on_inexact": "error"}
        found = accumulated_gradients(model, rows, **arguments | more)
    assert len(found) == len(wanted) == 3
    return max(relative_error(f, w) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("name", "given", "smoothing"),
    [
        (ROWS, "balanced", 0.0), (ROWS, WEIGHTS, 0.2), (TAGS, "balanced", 0.1), (CAUSAL, None, 0.1),
        (SUMMARIES, None, 0.1), pytest.param(ROWS, None, 0.2, marks=pytest.mark.slow),
        pytest.param(TAGS, WEIGHTS, 0.0, marks=pytest.mark.slow),
        pytest.param(IMAGES, "balanced", 0.0, marks=pytest.mark.slow),
        pytest.param("masked LM, BERT", None, 0.1, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_gradients_are_those_of_one_batch(name: str, given: Any, smoothing: float) -> None:
    rows = unequal_rows(HEADS[name])
    weights = balanced(rows) if given == "balanced" else given
    assert largest_error(name, rows, given, weights, smoothing) < 1e-12


def test_the_comparison_finds_labels_counted_instead_of_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: each micro-batch then counts by its number of labels, whatever their classes."""

    def counts_labels(*args: Any, **kwargs: Any) -> Objective:
        objective = measured_objective(*args, **kwargs)
        objective.count = lambda batch: {"loss": len(batch["labels"])}
        return objective

    monkeypatch.setattr("ftaccum.training.build_objective.measured_objective", counts_labels)
    assert largest_error(ROWS, unequal_rows(HEADS[ROWS]), WEIGHTS, WEIGHTS, 0.2, audit=False) > 1e-2


def test_reported_losses_are_weighted_and_smoothed_in_training_and_validation() -> None:
    head = HEADS[TAGS]
    model, rows, val_rows = head.model(), head.rows(13), head.rows(6, seed=3)
    weights = balanced(rows)
    wanted = [one_batch_loss(model.eval(), each, weights, 0.1, shifts=False).item() for each in (rows, val_rows)]
    result = test_fine_tuning(
        model, train_data=rows, val_data=val_rows, n_epochs=1, batch_size=2, effective_batch_size=13, progress=False,
        class_weights="balanced", label_smoothing=0.1,
    )  # fmt: skip
    assert [result.loss_history[0], result.initial_loss] == pytest.approx(wanted, rel=1e-12)


class Collated:
    """Rows that are computed, and whose labels only the collator makes."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return {"input_ids": self.rows[index]["input_ids"], "target": self.rows[index]["labels"]}


@pytest.mark.parametrize("form", ["list", "table", "collated"])
def test_the_banner_shows_balanced_weights_of_any_rows(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = unequal_rows(HEADS[ROWS])
    more: dict[str, Any] = {
        "list": {"train_data": rows},
        "table": {"train_data": Dataset.from_list(rows)},
        "collated": {
            "train_data": Collated(rows),
            "data_collator": lambda each: one_batch(
                [{"input_ids": row["input_ids"], "labels": row["target"]} for row in each]
            ),
        },
    }[form]
    test_fine_tuning(HEADS[ROWS].model(), class_weights="balanced", max_updates=1, validation_split=0.0, **more)
    shown = ", ".join(f"{weight:.4g}" for weight in balanced(rows))
    assert f"Class weights: {shown}\n" in capsys.readouterr().out


def test_a_class_without_labels_gets_the_weight_1(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"input_ids": [5, 6, 7 + n], "labels": int(n == 0)} for n in range(8)]
    test_fine_tuning(
        HEADS[ROWS].model(), train_data=rows, class_weights="balanced", max_updates=1, validation_split=0.0
    )
    assert "Class weights: 0.5714, 4, 1\n" in capsys.readouterr().out  # 8 / (2 × 7), 8 / (2 × 1)


@pytest.mark.parametrize("name", [TAGS, CAUSAL])
def test_verify_takes_the_settings(name: str) -> None:
    given: dict[str, Any] = {"label_smoothing": 0.1} | ({"class_weights": WEIGHTS} if name == TAGS else {})
    with all_in_float64():
        found = verify(HEADS[name].model(), HEADS[name].rows(), batch_size=2, n_splits=0, progress=False, **given)
    assert found.exact
    assert found.counted_by.startswith("class weights" if name == TAGS else "labels after the next-token shift")


WEIGHTED, SMOOTHED = {"class_weights": "balanced"}, {"label_smoothing": 0.1}


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        (CAUSAL, WEIGHTED, "`class_weights` is 'balanced', but LlamaForCausalLM predicts the tokens of a vocabulary"),
        (SUMMARIES, WEIGHTED, "BartForConditionalGeneration predicts the tokens of a vocabulary, not classes"),
        ("masked LM, BERT", WEIGHTED, "BertForMaskedLM predicts the tokens of a vocabulary"),
        ("regression, BERT", SMOOTHED, "`label_smoothing` is 0.1, but the labels are floats, as for regression"),
        ("multi-label, BERT", WEIGHTED, "`problem_type` is 'multi_label_classification'"),
        ("question answering, BERT", SMOOTHED, "the rows have no `labels`, only"),
        ("multiple choice, BERT", WEIGHTED, "each row has choices of its own"),
        (ROWS, {"class_weights": [1, 2]}, "`class_weights` has 2 numbers, but the model has 3 classes"),
    ],
)
def test_other_losses_are_refused(name: str, given: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        test_fine_tuning(HEADS[name].model(), train_data=HEADS[name].rows(), progress=False, **given)


def test_a_plain_module_takes_smoothing_of_the_next_token_but_no_class_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)).double()
    rows = [torch.arange(n, n + 3 + n % 3) % 9 for n in range(7)]
    arguments: dict[str, Any] = {"train_data": rows, "validation_split": 0.0, "max_updates": 1, "progress": False}
    wanted = torch.cat([F.cross_entropy(model(r)[:-1], r[1:], label_smoothing=0.1, reduction="none") for r in rows])
    result = test_fine_tuning(model, batch_size=2, effective_batch_size=7, **SMOOTHED, **arguments)
    assert result.loss_history == pytest.approx([wanted.mean().item()], rel=1e-12)
    with pytest.raises(SettingsError, match="Sequential predicts the tokens of a vocabulary, not classes"):
        test_fine_tuning(model, class_weights=[1] * 9, **arguments)


class WithPenalty(BertForSequenceClassification):
    """A model that adds a term to its loss, in train mode only."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        if self.training and outputs.loss is not None:
            outputs.loss = outputs.loss + 0.1 * outputs.logits.square().mean()
        return outputs


def test_a_loss_with_another_term_in_train_mode_is_refused() -> None:
    config: BertConfig = HEADS[ROWS].config
    with pytest.raises(SettingsError, match="the loss of WithPenalty is not the mean cross entropy of its logits"):
        test_fine_tuning(WithPenalty(config), train_data=HEADS[ROWS].rows(), progress=False, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"loss_fn": nn.CrossEntropyLoss()}, "but `loss_fn` is given, which computes the loss itself"),
        ({"count_items": len}, "but `count_items` counts the items of the loss without it"),
        ({"reduction": "sum"}, "but `reduction` is 'sum'"),
    ],
)
def test_a_users_loss_or_count_excludes_both_settings(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        test_fine_tuning(HEADS[ROWS].model(), train_data=HEADS[ROWS].rows(), **WEIGHTED, **SMOOTHED, **given)
    assert [fault.split("`")[1] for fault in caught.value.faults] == ["class_weights", "label_smoothing"]


def test_a_stream_takes_weights_but_cannot_balance_them() -> None:
    rows = HEADS[ROWS].rows()
    stream = IterableDataset.from_generator(lambda: iter(rows))
    arguments: dict[str, Any] = {"max_updates": 1, "validation_split": 0.0, "progress": False}
    with pytest.raises(SettingsError, match=r"whose labels cannot be counted, but `class_weights` is 'balanced'"):
        test_fine_tuning(HEADS[ROWS].model(), train_data=stream, **WEIGHTED, **arguments)
    model = HEADS[ROWS].model()
    wanted = one_batch_loss(model.eval(), rows[:4], WEIGHTS, 0.0, shifts=False).item()
    result = test_fine_tuning(model, train_data=stream, class_weights=WEIGHTS, **arguments)
    assert result.loss_history == pytest.approx([wanted], rel=1e-12)


@pytest.mark.parametrize("value", ["even", "1,x", [], [1.0, 0.0], [1, -2], [True, 2], [1, float("nan")], 2.0, {}])
def test_weights_must_be_positive_numbers(value: Any) -> None:
    with pytest.raises(SettingsError, match="`class_weights` must be 'balanced', or a list of one positive number"):
        parse_settings({"class_weights": value})


def test_the_command_line_reads_the_settings() -> None:
    words = ["--class_weights", "1,2.5", "--label_smoothing", "0.1", "--sampler", "balanced"]
    given = {name: value for kind in parse(OPTIONS["train"], words).options for name, value in vars(kind).items()}
    recipe = parse_settings(given)[0]
    assert (recipe.class_weights, recipe.label_smoothing, recipe.sampler) == ([1.0, 2.5], 0.1, "balanced")
    assert parse_settings({"class_weights": torch.tensor([1.0, 2.5])})[0].class_weights == [1.0, 2.5]


def test_a_search_does_not_vary_what_changes_the_validation_loss() -> None:
    assert reserved("class_weights") == reserved("label_smoothing") != None  # noqa: E711
    assert "by which trials are compared" in str(reserved("label_smoothing"))


def test_a_resumed_run_must_have_the_same_loss(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"train_data": HEADS[ROWS].rows(), "output_dir": str(tmp_path), "progress": False}
    test_fine_tuning(HEADS[ROWS].model(), max_updates=1, class_weights=WEIGHTS, **arguments)
    with pytest.raises(CheckpointError, match=r"`class_weights` was \[0\.5, 3\.0, 1\.25\], but is 'balanced' now"):
        test_fine_tuning(HEADS[ROWS].model(), max_updates=2, resume="auto", **WEIGHTED, **arguments)


def test_the_loss_is_torchs_in_16_bits_too() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 5, CLASSES).bfloat16(), torch.randint(0, CLASSES, (4, 5))
    labels[0, 1:] = IGNORED
    weight = torch.tensor(WEIGHTS, dtype=torch.float64)
    found = CrossEntropy(label_smoothing=0.3, weight=weight, shifted=True)(logits, {"labels": labels})
    wanted = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), weight.float(), label_smoothing=0.3
    )
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
