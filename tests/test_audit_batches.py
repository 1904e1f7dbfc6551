"""Audits of collated batches, and the ways to join and pad such batches."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from batch_audits import FILL, auditor_of, dummy, micro_batch, objective_of, sample_of, weighted_error, window_of
from ftaccum.accumulation.audit import Audit
from ftaccum.data.batches import join, padded, take
from ftaccum.data.column_fills import ColumnFills
from ftaccum.planning.audit_schedule import AuditSize
from ftaccum.runtime.accelerator import accelerator_session
from ftaccum.runtime.process_group import SINGLE
from ftaccum.settings.runtime import Runtime
from heads import HEADS, IGNORED, all_in_float64, one_batch, one_batch_gradient, relative_error

SIZES = (3, 1, 4, 1)
FILLS = ColumnFills(FILL, {})
LLAMA = HEADS["causal LM, Llama"]
SEVERAL = [
    "causal LM, Llama",
    "masked LM, BERT",
    "sequence classification, GPT-2",
    "regression, BERT",
    "seq2seq, BART",
    "image classification, ViT",
    "multiple choice, BERT",
]


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with accelerator_session(Runtime(), 0, None) as made:
        yield made


def audited(
    accelerator: Accelerator,
    name: str,
    sizes: tuple[int, ...] = SIZES,
    count: Callable[[Any], float] | None = None,
    *,
    size: AuditSize = AuditSize.WHOLE_WINDOW,
    left: bool = False,
) -> Audit | None:
    head = HEADS[name]
    model = head.model()
    with all_in_float64():
        objective = objective_of(head, model, count)
        sample = sample_of(window_of(objective, head.rows(sum(sizes)), sizes, left), objective, SINGLE, size)
        assert sample is not None
        return auditor_of(accelerator, model, objective, SINGLE, model).audit(sample, tolerance=None)


@pytest.mark.parametrize("name", SEVERAL)
def test_right_counts_are_at_rounding(name: str, accelerator: Accelerator) -> None:
    audit = audited(accelerator, name)
    assert audit is not None
    assert (audit.n_rows, audit.reference) == (sum(SIZES), "one batch")
    assert max(audit.error, audit.loss_error) < 1e-12
    assert audit.rounding is not None
    assert 0 < audit.rounding < 1e-6


def rows_in(batch: Any) -> float:
    return len(batch["labels"])


def columns_in(batch: Any) -> float:
    return batch["labels"].shape[1]


@pytest.mark.parametrize(("name", "count"), [("causal LM, Llama", rows_in), ("seq2seq, BART", columns_in)])
def test_a_wrong_count_has_the_error_that_plain_pytorch_gives(
    name: str, count: Callable[[Any], float], accelerator: Accelerator
) -> None:
    audit = audited(accelerator, name, count=count)
    head = HEADS[name]
    with all_in_float64():
        expected = weighted_error(head.model(), head.rows(sum(SIZES)), SIZES, count)
    assert audit is not None
    assert expected > 0.01
    assert audit.error == pytest.approx(expected, rel=0.1)  # sketches of large parameters are estimates


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [SIZES, (2, 2, 5)])
def test_without_room_for_one_batch_the_reference_is_another_cut(
    sizes: tuple[int, ...], accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftaccum.accumulation.one_batch.free_memory", lambda _: 0)
    right, wrong = (audited(accelerator, "causal LM, Llama", sizes, count) for count in (None, rows_in))
    assert right is not None
    assert wrong is not None
    assert right.reference == wrong.reference == "another cut"
    assert right.error < 1e-12
    assert right.rounding is not None
    assert 0 < right.rounding < 1e-6
    assert wrong.error > 0.01


def test_another_cut_of_single_rows_joins_pairs(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftaccum.accumulation.one_batch.free_memory", lambda _: 0)
    right, wrong = (audited(accelerator, "causal LM, Llama", (1, 1, 1), count) for count in (None, rows_in))
    assert right is not None
    assert wrong is not None
    assert right.error < 1e-12
    assert wrong.error > 0.01


def test_a_single_row_has_no_other_cut() -> None:
    objective = objective_of(LLAMA, LLAMA.model())
    sample = sample_of(window_of(objective, LLAMA.rows(1), (1,)), objective, SINGLE)
    assert sample is not None
    assert sample.cut_differently() is None


def test_other_cuts_halve_the_batches_and_reverse_keeps_them() -> None:
    objective = objective_of(LLAMA, LLAMA.model())
    rows = LLAMA.rows(9)
    window = [dummy(objective, one_batch(rows[:1])), *window_of(objective, rows, SIZES)]
    sample = sample_of(window, objective, SINGLE)
    assert sample is not None
    other = sample.cut_differently()
    assert other is not None
    assert [len(micro.batch["labels"]) for micro in other.load()] == [2, 1, 1, 2, 2, 1]
    turned = sample.reversed().load()
    assert [micro.is_dummy for micro in turned] == [True, False, False, False, False]
    assert torch.equal(turned[1].batch["labels"], window[4].batch["labels"])
    assert torch.equal(turned[2].batch["labels"], window[3].batch["labels"].flip(0))


def test_an_audit_of_a_few_rows_takes_two_micro_batches_one_with_the_rarest_labels() -> None:
    head = HEADS["sequence classification, BERT"]
    objective = objective_of(head, head.model())
    rows = [{**row, "labels": 2 if n == 6 else n % 2} for n, row in enumerate(head.rows(12))]
    sample = sample_of(window_of(objective, rows, (2,) * 6), objective, SINGLE, size=AuditSize.FEW_ROWS)
    assert sample is not None
    labels = [micro.batch["labels"].tolist() for micro in sample.load()]
    assert [2, 1] in labels
    assert len(labels) == 2
    assert sample.n_rows == 4


def test_rows_without_loss_items_are_left_out(accelerator: Accelerator) -> None:
    model = LLAMA.model()
    with all_in_float64():
        objective = objective_of(LLAMA, model)
        window = window_of(objective, LLAMA.rows(5), (2, 3))
        empty = {name: value.clone() for name, value in window[0].batch.items()}
        empty["labels"][:] = IGNORED
        window.insert(0, replace(micro_batch(objective, empty), terms=objective.terms))
        sample = sample_of(window, objective, SINGLE)
        assert sample is not None
        audit = auditor_of(accelerator, model, objective, SINGLE, model).audit(sample, tolerance=None)
    assert audit is not None
    assert audit.n_rows == 5
    assert audit.error < 1e-12


@pytest.mark.parametrize("extra", [torch.zeros(()), torch.zeros(7), "text", None])
def test_batches_that_cannot_be_taken_apart_are_not_audited(extra: Any) -> None:
    objective = objective_of(LLAMA, LLAMA.model())
    window = window_of(objective, LLAMA.rows(5), (2, 3))
    assert sample_of(window, objective, SINGLE) is not None
    odd = [window[0], replace(window[1], batch=window[1].batch | {"extra": extra})]
    assert sample_of(odd, objective, SINGLE) is None
    assert sample_of([dummy(objective, window[0].batch)], objective, SINGLE) is None


def test_batches_that_cannot_be_joined_are_audited_in_another_cut(accelerator: Accelerator) -> None:
    model = LLAMA.model()
    with all_in_float64():
        objective = objective_of(LLAMA, model)
        window = window_of(objective, LLAMA.rows(9), SIZES)
        without = [
            replace(micro, batch={k: v for k, v in micro.batch.items() if k != "attention_mask"}) for micro in window
        ]
        sample = sample_of(without, objective, SINGLE)
        assert sample is not None
        audit = auditor_of(accelerator, model, objective, SINGLE, model).audit(sample, tolerance=None)
    assert audit is not None
    assert audit.reference == "another cut"
    assert audit.error < 1e-12


def test_parts_that_cannot_be_counted_are_not_compared() -> None:
    def only_even(batch: Any) -> float:
        assert len(batch["labels"]) % 2 == 0
        return float((batch["labels"][:, 1:] != IGNORED).sum())

    objective = objective_of(LLAMA, LLAMA.model(), only_even)
    sample = sample_of(window_of(objective, LLAMA.rows(4), (2, 2)), objective, SINGLE)
    assert sample is not None
    assert sample.cut_differently() is None
    assert sample.in_one() is not None


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", HEADS)
def test_joined_batches_equal_the_batch_of_all_rows(name: str) -> None:
    rows = HEADS[name].rows()
    joined = join([one_batch(rows[:2]), one_batch(rows[2:3]), one_batch(rows[3:])], FILL)
    assert joined is not None
    assert equal(joined, one_batch(rows))


def test_joined_batches_of_left_padded_rows_have_the_same_gradient() -> None:
    rows, model = LLAMA.rows(), LLAMA.model()
    joined = join([one_batch(rows[:2], left=True), one_batch(rows[2:], left=True)], FILL)
    assert joined is not None
    with all_in_float64():
        expected = one_batch_gradient(model, rows, left=True)
        model(**joined).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert relative_error(found, expected) < 1e-12


def test_columns_as_wide_as_the_tokens_are_padded_and_those_of_a_decoder_to_their_own_width() -> None:
    def batch(rows: int, width: int, of_labels: int) -> dict[str, Tensor]:
        ids = torch.full((rows, width), 5)
        labels = torch.full((rows, of_labels), 7)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "completion_mask": torch.ones_like(ids, dtype=torch.bool),
            "labels": labels,
            "decoder_input_ids": labels,
        }

    joined = join([batch(2, 3, 6), batch(1, 5, 2)], FILL | {"input_ids": 9})
    assert joined is not None
    assert joined["input_ids"].tolist() == [[5, 5, 5, 9, 9]] * 2 + [[5] * 5]
    assert joined["attention_mask"].tolist() == [[1, 1, 1, 0, 0]] * 2 + [[1] * 5]
    assert joined["completion_mask"].tolist() == [[True, True, True, False, False]] * 2 + [[True] * 5]
    assert joined["labels"].tolist() == [[7] * 6] * 2 + [[7, 7, *[IGNORED] * 4]]
    assert joined["decoder_input_ids"].tolist() == [[7] * 6] * 2 + [[7, 7, 9, 9, 9, 9]]


def test_pairs_of_inputs_and_targets_are_joined() -> None:
    pairs = [(torch.randn(n, 3), torch.arange(n)) for n in (2, 1, 4)]
    inputs, targets = join(pairs, FILL)
    assert torch.equal(inputs, torch.cat([x for x, _ in pairs]))
    assert torch.equal(targets, torch.cat([y for _, y in pairs]))
    tokens = [
        ({"input_ids": torch.ones(1, n).long(), "attention_mask": torch.ones(1, n)}, torch.ones(1, n).long())
        for n in (2, 3)
    ]
    assert join(tokens, FILL)[1].tolist() == [[1, 1, IGNORED], [1, 1, 1]]


def ids(width: int) -> Tensor:
    return torch.ones(2, width, dtype=torch.long)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"x": torch.zeros(2, 3)}, {"x": torch.zeros(2, 4)}),
        ({"x": torch.zeros(2)}, {"y": torch.zeros(2)}),
        ({"x": torch.zeros(2)}, {"x": torch.zeros(2).long()}),
        ({"x": torch.zeros(2)}, {"x": torch.zeros(())}),
        ({"x": torch.zeros(2)}, {"x": torch.zeros(2), "n": 3}),
        ({"x": torch.zeros(2)}, (torch.zeros(2), torch.zeros(2))),
        ({"x": torch.zeros(2), "s": torch.zeros(3)}, {"x": torch.zeros(2), "s": torch.zeros(2)}),
        (
            {"input_ids": ids(3), "attention_mask": torch.ones(2, 3, 3)},
            {"input_ids": ids(4), "attention_mask": torch.ones(2, 4, 4)},
        ),
        ({"input_ids": ids(3), "labels": torch.ones(2, 3)}, {"input_ids": ids(3), "labels": torch.ones(2, 4)}),
    ],
)
def test_batches_that_do_not_fit_together_are_not_joined(one: Any, other: Any) -> None:
    assert join([one, other], FILL) is None
    assert join([other, one], FILL) is None


def test_a_batch_is_padded_to_a_width() -> None:
    rows = LLAMA.rows()
    widest = one_batch(rows)
    narrow = one_batch(rows[:2])
    width = widest["input_ids"].shape[1] + 3
    found = padded(narrow, width, FILLS)
    assert {value.shape for value in found.values()} == {(2, width)}
    assert equal({name: value[:, : narrow[name].shape[1]] for name, value in found.items()}, narrow)
    assert set(found["labels"][:, narrow["labels"].shape[1] :].flatten().tolist()) == {IGNORED}
    assert set(found["attention_mask"][:, narrow["labels"].shape[1] :].flatten().tolist()) == {0}
    assert padded(narrow, narrow["input_ids"].shape[1], FILLS) is narrow
    image = {"pixel_values": torch.zeros(2, 1, 8, 8)}
    assert padded(image, 9, FILLS) is image


def test_padding_leaves_labels_per_class_and_a_decoder_alone() -> None:
    batch = {"input_ids": ids(3), "labels": torch.ones(2, 3)}
    assert padded(batch, 5, FILLS)["labels"].shape == (2, 3)
    batch = {"input_ids": ids(3), "labels": ids(3), "decoder_input_ids": ids(3)}
    found = padded(batch, 5, FILLS)
    assert {name: value.shape[1] for name, value in found.items()} == {
        "input_ids": 5, "labels": 3, "decoder_input_ids": 3,
    }  # fmt: skip
    choices = one_batch(HEADS["multiple choice, BERT"].rows(2))
    assert padded(choices, 20, FILLS)["input_ids"].shape == (2, 3, 20)


def test_span_heads_padded_to_one_width_are_at_rounding(accelerator: Accelerator) -> None:
    head = HEADS["question answering, BERT"]
    model, rows = head.model(), head.rows()
    objective = objective_of(head, model)
    whole = one_batch(rows)
    parts = [one_batch(rows[:4]), take(whole, range(4, 9))]
    errors = []
    for batches in (parts, [padded(batch, whole["input_ids"].shape[1], FILLS) for batch in parts]):
        sample = sample_of([micro_batch(objective, batch) for batch in batches], objective, SINGLE)
        assert sample is not None
        audit = auditor_of(accelerator, model, objective, SINGLE, model).audit(sample, tolerance=None)
        assert audit is not None
        errors.append(audit.error)
    assert errors[0] > 1e-6
    assert errors[1] < 1e-12


@pytest.mark.slow
def test_unequal_shares_of_two_processes_are_audited(two_processes: Callable[..., str]) -> None:
    assert two_processes("audit_batches_of_two.py").count("audited") == 2
