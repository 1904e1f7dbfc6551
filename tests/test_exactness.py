"""The contract: every window's gradient equals that of one batch of its rows."""

import json
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BeitConfig, BeitForImageClassification

from exactness import window_errors
from ftaccum import InexactLossWarning, plan, test_fine_tuning
from ftaccum.data.dataset import Rows
from ftaccum.data.probe_rows import sample_positions
from heads import HEADS, RecordingOptimizer, Row, all_in_float64, one_batch, one_batch_gradient, relative_error
from slow_parameters import FAST_HEADS, some_slow
from structures import RARE, STRUCTURES, Branching, with_a_narrow_weight

FAST_APART = ("conditional branches", "frozen weights", "tied weights")
# Means over tokens, over rows, and over rows whose loss depends on the padded width.
FAST_ON_TWO = ("causal LM, Llama", "sequence classification, BERT", "question answering, BERT")


@pytest.mark.parametrize("name", some_slow(HEADS, FAST_HEADS))
def test_gradient_of_every_window_is_that_of_one_batch(name: str) -> None:
    head = HEADS[name]
    with all_in_float64():
        # 9 rows: two windows of 4, and a remainder of 1
        errors = window_errors(head.model(), head.rows(), batch_size=2, gradient_accumulation_steps=2)
        # a window of 7, whose last micro-batch is short, and a remainder of 2
        errors += window_errors(head.model(), head.rows(), batch_size=2, effective_batch_size=7)
    assert len(errors) == 5
    assert max(errors) < 1e-10


@pytest.mark.parametrize(
    "name", some_slow([name for name, head in HEADS.items() if head.tolerance > 1e-10], ["causal LM, Llama"])
)
def test_heads_with_a_float32_part_are_exact_up_to_float32_rounding(name: str) -> None:
    head = HEADS[name]
    assert max(window_errors(head.model(), head.rows(), batch_size=2, effective_batch_size=7)) < head.tolerance


@pytest.mark.processes
@pytest.mark.parametrize(
    "names",
    [FAST_ON_TWO, pytest.param(sorted(HEADS.keys() - set(FAST_ON_TWO)), marks=pytest.mark.slow)],
    ids=["fast", "others"],
)
def test_two_processes_have_the_gradient_of_one_batch_or_both_raise(
    two_processes: Callable[..., str], names: Sequence[str]
) -> None:
    printed = dict(line.split(" ", 1) for line in two_processes("all_heads.py", *names).splitlines() if " " in line)
    errors = json.loads(printed["ERRORS"])
    assert errors.keys() == set(names)
    assert max(errors.values()) < 1e-10, errors
    one, other = json.loads(printed["TOLD"])
    assert one == other
    assert "BatchNorm1d '1' mixes the rows" in one


@pytest.mark.parametrize(
    ("name", "wide"),
    [
        pytest.param(
            name, wide, id=f"{name}-{where}", marks=[pytest.mark.slow] if wide and name not in FAST_APART else []
        )
        for name in STRUCTURES
        for wide, where in ((False, "by autograd"), (True, "apart"))
    ],
)
def test_weights_unused_in_some_passes_are_exact_in_both_gradient_sums(name: str, wide: bool) -> None:
    structure = STRUCTURES[name]
    model = with_a_narrow_weight(structure.model()) if wide else structure.model()
    sizes = {"batch_size": 2, "effective_batch_size": 7}
    with all_in_float64():
        errors = window_errors(model, structure.rows(), accumulate_in_fp32=wide, **sizes, **structure.arguments)
    assert max(errors) < 1e-10


@pytest.mark.processes
@pytest.mark.slow
def test_weights_unused_on_one_process_are_exact_on_two(two_processes: Callable[..., str]) -> None:
    printed = two_processes("structures_of_two.py")
    errors = json.loads(next(line for line in printed.splitlines() if line.startswith("ERRORS "))[7:])
    assert len(errors) == 2 * len(STRUCTURES) + 3 + 2
    assert max(errors.values()) < 1e-10, errors


def test_dividing_by_k_gives_a_wrong_gradient() -> None:
    """A control of the harness: the usual `loss / k` over the same micro-batches has an error above 10 %."""
    head = HEADS["causal LM, Llama"]
    model, rows = head.model(), head.rows(7)
    wanted = one_batch_gradient(model, rows)
    for start in range(0, 7, 2):
        (model(**one_batch(rows[start : start + 2])).loss / 4).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert relative_error(found, wanted) > 0.1


@pytest.mark.parametrize("name", ["causal LM, Llama", "token classification, BERT"])
def test_micro_batches_without_loss_items_contribute_nothing(name: str) -> None:
    head = HEADS[name]
    rows = [{**row, "labels": [-100] * len(row["labels"])} if n % 3 else row for n, row in enumerate(head.rows(12))]
    with all_in_float64():
        assert max(window_errors(head.model(), rows, batch_size=1, gradient_accumulation_steps=6)) < 1e-10


def test_a_dummy_moves_no_weights_that_its_window_does_not_use() -> None:
    """The dummy, the shortest row, takes a different branch than the only labelled row of the first window."""
    rows: list[Row] = [{"input_ids": [5, 6, 7, 8 + n], "labels": -100} for n in range(4)]
    order = next(plan(5, n_epochs=1, validation_split=0.0, effective_batch_size=4).windows(0)).rows
    every = {order[0]: {"input_ids": [5, 9, 9, 9], "labels": 1}, **dict(zip(order[1:], rows, strict=False))}
    (rest,) = set(range(5)) - set(order)
    every[rest] = {"input_ids": [RARE, 3], "labels": 2}
    model = Branching()
    seen: list[bool] = []

    class Watched(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:
            seen.append(model.rare.weight.grad is None)
            super().step(closure)

    test_fine_tuning(
        model, train_data=[every[n] for n in range(5)], batch_size=1, effective_batch_size=4, n_epochs=1,
        validation_split=0.0, optimizer=Watched, planner=False, progress=False,
    )  # fmt: skip
    assert seen == [True, False]


def test_a_window_without_loss_items_is_a_skipped_update() -> None:
    head = HEADS["token classification, BERT"]
    rows = [{**row, "labels": [-100] * len(row["labels"])} if n else row for n, row in enumerate(head.rows(3))]
    model = head.model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = test_fine_tuning(
        model, train_data=rows, batch_size=1, n_epochs=1, validation_split=0.0, progress=False, lr_scheduler="constant"
    )
    assert (result.optimizer_steps, result.skipped_steps) == (1, 2)
    assert sorted(map(math.isnan, result.loss_history)) == [False, True, True]
    assert sorted(result.grad_norm_history)[:2] == [0.0, 0.0]
    assert all(p.isfinite().all() for p in model.parameters())
    assert any((p != before[name]).any() for name, p in model.named_parameters())


def test_a_dummy_leaves_no_trace_in_buffers_and_generators() -> None:
    """Only rows with loss items change the statistics of batch norm and the random numbers of dropout."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.head = nn.Embedding(61, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            hidden_BLD = self.norm(self.embed(input_ids).transpose(1, 2)).transpose(1, 2)
            return self.head(nn.functional.dropout(hidden_BLD, training=self.training))

    def loss(logits_BLV: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(logits_BLV.flatten(0, 1), batch["labels"].flatten())

    def trained(rows: list[Row]) -> nn.Module:
        torch.manual_seed(0)
        model = Tagger()
        # Rows of equal length are not sorted, and in one window the dummies are between the other rows.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InexactLossWarning)
            test_fine_tuning(
                model, train_data=rows, loss_fn=loss, batch_size=1, gradient_accumulation_steps=len(rows),
                n_epochs=1, validation_split=0.0, progress=False,
            )  # fmt: skip
        return model

    ids = torch.randint(0, 61, (6, 5), generator=torch.Generator().manual_seed(1)).tolist()
    every = [{"input_ids": i, "labels": [n % 3] * 5 if n < 3 else [-100] * 5} for n, i in enumerate(ids)]
    order = next(plan(6, batch_size=1, gradient_accumulation_steps=6, validation_split=0.0).windows(0)).rows
    labelled_first = [n for n in order if n < 3]
    alone = [every[n] for n in labelled_first]
    alone_order = next(plan(3, batch_size=1, gradient_accumulation_steps=3, validation_split=0.0).windows(0)).rows
    alone = [alone[alone_order.index(n)] for n in range(3)]  # so that they are drawn in the same order
    with_ghosts, without = trained(every).state_dict(), trained(alone).state_dict()
    for name, value in without.items():
        assert torch.equal(with_ghosts[name], value), name


def test_losses_given_as_sums_and_named_terms_are_exact() -> None:
    draw = torch.Generator().manual_seed(3)
    rows = [(torch.randn(4, generator=draw).double(), torch.randn(3, generator=draw).double()) for _ in range(7)]
    wanted_model = _linear()
    inputs, targets = (torch.stack(column) for column in zip(*rows, strict=True))
    (nn.functional.mse_loss(wanted_model(inputs), targets) + wanted_model(inputs).abs().mean()).backward()

    def mean_terms(outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"fit": nn.functional.mse_loss(outputs, targets), "size": outputs.abs().mean()}

    def sum_terms(outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"fit": ((outputs - targets) ** 2).sum(), "size": outputs.abs().sum()}

    for arguments in (
        {"loss_fn": mean_terms},
        {"loss_fn": sum_terms, "reduction": "sum"},
        {"loss_fn": sum_terms, "reduction": "sum", "count_items": lambda batch: batch[1].numel()},
        {"loss_fn": mean_terms, "count_items": lambda batch: {"fit": len(batch[0]), "size": len(batch[0])}},
    ):
        model = _linear()
        optimizer = RecordingOptimizer(model)
        result = test_fine_tuning(
            model, train_data=rows, optimizer=optimizer, batch_size=2, effective_batch_size=7, n_epochs=1,
            validation_split=0.0, gradient_clip_norm=None, progress=False, **arguments,
        )  # fmt: skip
        wanted = {name: p.grad for name, p in wanted_model.named_parameters() if p.grad is not None}
        assert relative_error(optimizer.gradients[0], wanted) < 1e-12, arguments
        whole = sum(value.item() for value in mean_terms(wanted_model(inputs), targets).values())
        assert result.loss_history == pytest.approx([whole], rel=1e-12)


def _linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def test_each_term_is_divided_by_its_own_number_of_items() -> None:
    """A term that only some rows have (marked by a positive first feature) is a mean over those rows."""
    draw = torch.Generator().manual_seed(3)
    rows = [
        {"x": torch.randn(4, generator=draw).double(), "y": torch.randn(3, generator=draw).double()} for _ in "1234567"
    ]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _linear()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    def terms(outputs: torch.Tensor, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        marked = batch["x"][:, 0] > 0
        return {"all": ((outputs - batch["y"]) ** 2).mean(), "marked": outputs[marked].abs().sum(1).mean()}

    def count(batch: dict[str, torch.Tensor]) -> dict[str, int]:
        return {"all": len(batch["x"]), "marked": int((batch["x"][:, 0] > 0).sum())}

    assert 0 < count({"x": torch.stack([row["x"] for row in rows])})["marked"] < 7
    wanted_model = Net()
    sum(terms(*_together(wanted_model, rows)).values()).backward()
    model = Net()
    optimizer = RecordingOptimizer(model)
    test_fine_tuning(
        model, train_data=rows, loss_fn=terms, count_items=count, optimizer=optimizer, batch_size=1,
        effective_batch_size=7, n_epochs=1, validation_split=0.0, gradient_clip_norm=None, progress=False,
    )  # fmt: skip
    wanted = {name: p.grad for name, p in wanted_model.named_parameters() if p.grad is not None}
    assert relative_error(optimizer.gradients[0], wanted) < 1e-12


def _together(model: nn.Module, rows: list[Row]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return model(x=batch["x"]), batch


def test_a_random_collator_draws_the_same_numbers_for_every_split() -> None:
    class HidesSome:
        """A collator that draws new masked-LM labels in each call."""

        def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
            batch = one_batch([{"input_ids": row["input_ids"]} for row in rows])
            hidden = (torch.rand(batch["input_ids"].shape) < 0.3) & batch["attention_mask"].bool()
            hidden[:, 0] = True
            return {**batch, "labels": batch["input_ids"].masked_fill(~hidden, -100)}

    head = HEADS["masked LM, BERT"]
    rows = [{"input_ids": row["input_ids"]} for row in head.rows()]
    found = []
    for sizes in (
        {"batch_size": 8},
        {"batch_size": 3, "effective_batch_size": 8},
        {"batch_size": 1, "effective_batch_size": 8},
    ):
        model = head.model()
        optimizer = RecordingOptimizer(model)
        test_fine_tuning(
            model, train_data=rows, data_collator=HidesSome(), optimizer=optimizer, n_epochs=2,
            validation_split=0.0, gradient_clip_norm=None, progress=False, **sizes,
        )  # fmt: skip
        found.append(optimizer.gradients)
    for other in found[1:]:
        assert len(other) == 4
        assert max(relative_error(o, w) for o, w in zip(other, found[0], strict=True)) < 1e-10
    assert relative_error(found[0][2], found[0][0]) > 1e-3, "the second epoch draws anew"


def test_question_answering_keeps_one_width_with_a_custom_count() -> None:
    head = HEADS["question answering, BERT"]
    count = lambda batch: len(batch["input_ids"])
    errors = window_errors(head.model(), head.rows(), batch_size=2, effective_batch_size=7, count_items=count)
    assert max(errors) < 1e-10


@pytest.mark.slow
def test_sensitivity_to_padding_is_detected_if_few_rows_are_short() -> None:
    head = HEADS["question answering, BERT"]
    same = [row for row in head.rows(400) if len(row["input_ids"]) == 9]
    short = next(row for row in head.rows(400) if len(row["input_ids"]) == 3)
    rows = [same[n % len(same)] for n in range(64)]
    seen = sample_positions(Rows("train_data", rows))
    for position in [n for n in range(64) if n not in seen][:3]:
        rows[position] = short
    assert max(window_errors(head.model(), rows, batch_size=2, effective_batch_size=16)) < 1e-10


def test_labels_of_255_are_classes_if_no_pixels_are_labelled() -> None:
    torch.manual_seed(0)
    config = BeitConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        num_channels=1, num_labels=300, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, drop_path_rate=0.0,
    )  # fmt: skip
    assert config.semantic_loss_ignore_index == 255
    rows = [{**row, "labels": 255 if n % 2 else n} for n, row in enumerate(HEADS["image classification, ViT"].rows())]
    model = BeitForImageClassification(config).double()
    assert max(window_errors(model, rows, batch_size=2, effective_batch_size=7)) < 1e-10


def test_gradients_that_exist_before_training_are_discarded() -> None:
    head = HEADS["sequence classification, BERT"]
    model = head.model()
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    optimizer = RecordingOptimizer(model)
    rows = head.rows(4)
    test_fine_tuning(
        model, train_data=rows, optimizer=optimizer, batch_size=2, effective_batch_size=4, n_epochs=1,
        validation_split=0.0, gradient_clip_norm=None, progress=False,
    )  # fmt: skip
    assert relative_error(optimizer.gradients[0], one_batch_gradient(head.model(), rows)) < 1e-10


def test_parameters_outside_the_optimizer_do_not_count_in_the_gradient_norm() -> None:
    head = HEADS["sequence classification, BERT"]
    model, rows = head.model(), head.rows(8)
    wanted = [
        sum(float((g**2).sum()) for name, g in one_batch_gradient(model, part).items() if "classifier" in name) ** 0.5
        for part in (
            [rows[n] for n in window.rows]
            for window in plan(8, effective_batch_size=4, n_epochs=1, validation_split=0.0).windows(0)
        )
    ]
    result = test_fine_tuning(
        model, train_data=rows, optimizer=torch.optim.SGD(model.classifier.parameters(), lr=0.0), batch_size=2,
        effective_batch_size=4, n_epochs=1, validation_split=0.0, gradient_clip_norm=None, progress=False,
    )  # fmt: skip
    assert result.grad_norm_history == pytest.approx(wanted, rel=1e-9)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("name", "left"), [("sequence classification, Llama", True), ("causal LM, Llama", False)])
def test_left_padding_and_checkpointing_are_exact(name: str, left: bool) -> None:
    """Rows of a causal LM are always padded on the right: on the left, padding would predict the first token."""
    head = HEADS[name]

    class Tokenizer:
        pad_token_id, padding_side = 0, "left"

        def save_pretrained(self, folder: str) -> None: ...

    with all_in_float64():
        model = head.model()
        optimizer = RecordingOptimizer(model)
        rows = head.rows(6)
        wanted = one_batch_gradient(model, rows, left=left)
        test_fine_tuning(
            model, train_data=rows, tokenizer=Tokenizer(), optimizer=optimizer, batch_size=2, effective_batch_size=6,
            n_epochs=1, validation_split=0.0, gradient_clip_norm=None, gradient_checkpointing=True, progress=False,
        )  # fmt: skip
    assert relative_error(optimizer.gradients[0], wanted) < 1e-9  # angles of shifted positions are computed in float32
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
