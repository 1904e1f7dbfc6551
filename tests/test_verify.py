"""`verify` tells exact losses from inexact ones and changes no state."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from ftaccum import SettingsError, Verification, verify
from ftaccum.apps.cli import main
from ftaccum.apps.verify.bench import Bench
from ftaccum.apps.verify.gradients import WindowGradient
from ftaccum.apps.verify.reference import Reference
from ftaccum.apps.verify.splits import splits_of
from ftaccum.data.convert import as_rows
from ftaccum.objective.normalizer import LossNormalizer, WeightedMeans
from ftaccum.planning.micro_batches import BatchLimits, MicroBatchPlanner
from heads import HEADS, all_in_float64, one_batch, one_batch_gradient, relative_error
from slow_parameters import some_slow

SIZES: dict[str, Any] = {"batch_size": 3, "effective_batch_size": 11, "progress": False}
BERT, QUESTIONS, CAUSAL = "sequence classification, BERT", "question answering, BERT", "causal LM, Llama"
KINDS = [
    BERT,
    QUESTIONS,
    CAUSAL,
    "masked LM, BERT",
    "token classification, RoBERTa",
    "seq2seq, BART",
    "regression, BERT",
]


def of_head(name: str, **arguments: Any) -> Verification:
    with all_in_float64():
        return verify(HEADS[name].model(), HEADS[name].rows(30), **(SIZES | arguments))


@pytest.mark.parametrize("name", some_slow(KINDS, (BERT, QUESTIONS)))
def test_every_split_of_a_mean_over_items_is_exact(name: str) -> None:
    found = of_head(name)
    assert found.exact
    assert found.dtype == "float64"
    assert max(error for m in found.splits for error in (m.gradient_error, m.loss_error) if error is not None) < 1e-10
    if name != CAUSAL:  # it computes rotary angles in float32, which raises the floor
        assert found.floor < 1e-14
        assert found.tolerance == 1e-10
    named = {measured.split: measured for measured in found.splits}
    assert (named["as trained"].rows, named["as trained"].passes) == (11, 4)
    assert named["one row at a time"].passes == 11
    assert {"remainder of 1", "remainder of 3", "remainder of 6", "remainder of 9", "remainder of 10"} <= named.keys()
    assert sum(name.startswith("random") for name in named) == 3
    # If padding matters, all rows are padded to the longest anyway, and a note reports it.
    assert ("padded to the width of the window" in named) == (name != QUESTIONS)
    assert any("padded to one width" in note for note in found.notes) == (name == QUESTIONS)


def test_the_reference_is_one_batch_in_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, all splits could be equally wrong."""
    seen: list[tuple[Bench, tuple[int, ...], WindowGradient]] = []
    together = Bench.together

    def recorded(bench: Bench, rows: tuple[int, ...], **others: Any) -> WindowGradient:
        found = together(bench, rows, **others)
        seen.append((bench, rows, found))
        return found

    monkeypatch.setattr(Bench, "together", recorded)
    head = HEADS[CAUSAL]
    assert of_head(CAUSAL, n_splits=0).exact
    assert {len(rows) for _, rows, _ in seen} == {11, 1, 3, 6, 9, 10}
    model, every = head.model(), head.rows(30)
    names = [name for name, _ in model.named_parameters()]
    for _, rows, found in seen:
        with all_in_float64():
            wanted = one_batch_gradient(model, [every[n] for n in rows])
        assert relative_error(dict(zip(names, found.gradient, strict=True)), wanted) < 1e-6  # type: ignore[arg-type]
        assert found.loss == pytest.approx(float(model(**one_batch([every[n] for n in rows])).loss.detach()), rel=1e-6)


def test_a_broken_accumulation_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def mean_of_means(self: LossNormalizer, means: dict[str, Tensor], _: Any) -> Tensor:
        return torch.stack(list(means.values())).sum() / self._n_divided_by

    monkeypatch.setattr(LossNormalizer, "contribution", mean_of_means)
    found = of_head(CAUSAL, n_splits=0)
    assert not found
    wrong = {measured.split for measured in found.splits if not measured.exact}
    assert {"as trained", "equal slices, in order of arrival", "one row at a time"} <= wrong
    assert "remainder of 3" not in wrong, "of one micro-batch the mean is right"
    assert "NOT EXACT: " in str(found)
    assert "Is `count_items` right?" in str(found).replace("\n  ", " ")
    # The broken accumulation is `loss / k`.
    errors = {measured.split: measured.gradient_error for measured in [*found.splits, *found.others]}
    assert errors["loss / k"] == pytest.approx(errors["equal slices, in order of arrival"], rel=1e-6)


@pytest.mark.parametrize("factor", [1.001, float("nan")])
@pytest.mark.slow
def test_a_wrong_loss_with_a_right_gradient_is_found(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    total = WeightedMeans.total
    monkeypatch.setattr("ftaccum.objective.normalizer.WeightedMeans.total", lambda means: factor * total(means))
    found = of_head(BERT)
    assert not any(measured.exact for measured in found.splits)
    assert max(measured.gradient_error or 0.0 for measured in found.splits) < 1e-10
    assert json.loads(found.to_json())["splits"][0]["loss_error"] == (None if factor != factor else pytest.approx(1e-3))


@pytest.mark.slow
def test_parts_that_a_head_computes_in_float32_count_as_rounding() -> None:
    found = verify(HEADS[CAUSAL].model(), HEADS[CAUSAL].rows(30), **SIZES)
    assert found.exact
    assert max(measured.gradient_error or 0.0 for measured in found.splits) > 1e-9
    assert 1e-9 < found.floor < 1e-6
    # A single row has only one order, but the float32 parts are still noticed.
    alone = verify(HEADS[CAUSAL].model(), HEADS[CAUSAL].rows(30), batch_size=1, progress=False)
    assert (len(alone.splits), alone.exact) == (6, True)
    assert 1e-9 < alone.floor < 1e-6


@pytest.mark.slow
def test_the_report_includes_the_errors_of_other_methods() -> None:
    """`Trainer` 5.23 passes the count of items to any model that takes keywords, and relies on it to divide."""
    named = {m.split.split(",")[0]: m for m in of_head(BERT, batch_size=2, effective_batch_size=8).others[:1]}
    assert named["loss / k"].gradient_error == pytest.approx(0, abs=1e-10), "rows in equal numbers"
    for name, divided, trainer in ((BERT, 0.1, 3.0), (CAUSAL, 0.1, 0.0)):
        _, short, by_trainer = of_head(name, batch_size=2, effective_batch_size=8).others
        assert (short.split, by_trainer.split.split(",")[0]) == ("loss / k, remainder of 7", "Trainer")
        assert short.gradient_error is not None
        assert short.gradient_error > divided
        assert by_trainer.gradient_error == pytest.approx(trainer, abs=1e-9)
        assert short.exact is by_trainer.exact is None


class Normed(nn.Module):
    """A model with batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.drop, self.last = (
            nn.Linear(4, 8),
            nn.BatchNorm1d(8),
            nn.Dropout(0.5),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(x))))


FEATURES = [{"x": torch.randn(4, generator=torch.Generator().manual_seed(n)), "y": n % 3} for n in range(20)]


def cross_entropy(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch["y"])


def in_batch(outputs: Tensor, _: Any) -> Tensor:
    each = F.normalize(outputs, dim=-1)
    return F.cross_entropy(each @ each.T, torch.arange(len(each)))


@pytest.mark.parametrize(
    ("loss_fn", "reason"),
    [(cross_entropy, "BatchNorm1d 'norm' mixes"), (in_batch, "compared with each other")],
)
def test_losses_that_no_weighting_makes_exact_are_reported(loss_fn: Callable[..., Tensor], reason: str) -> None:
    model = Normed() if loss_fn is cross_entropy else nn.Sequential(nn.Linear(4, 8))
    if isinstance(model, nn.Sequential):
        model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    found = verify(model, FEATURES, loss_fn=loss_fn, batch_size=2, effective_batch_size=8, progress=False)
    assert not found.exact
    assert found.splits[0].gradient_error is not None
    assert found.splits[0].gradient_error > 0.1
    assert reason in " ".join(found.reasons)
    assert reason.split()[0] in str(found)
    alone = next(measured for measured in found.splits if measured.split == "one row at a time")
    if loss_fn is cross_entropy:
        assert (alone.gradient_error, alone.exact) == (None, False)
        assert alone.note == "(the model cannot run on a single row)"


def test_a_model_with_its_own_generator_makes_the_result_inconclusive() -> None:
    own = torch.Generator().manual_seed(0)

    class Drawing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * (torch.rand(x.shape, generator=own) > 0.5))

    loss = lambda outputs, batch: F.cross_entropy(outputs, batch["y"])
    found = verify(Drawing(4, 3), FEATURES, loss_fn=loss, batch_size=2, effective_batch_size=8, progress=False)
    assert not found.exact
    assert "the table is not conclusive" in str(found)


def with_dropout() -> BertForSequenceClassification:
    config = {**HEADS[BERT].config.to_dict(), "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    return BertForSequenceClassification(BertConfig(**config))


@pytest.mark.slow
def test_dropout_does_not_affect_recomputation_by_checkpointing() -> None:
    found = verify(with_dropout(), HEADS[BERT].rows(30), gradient_checkpointing=True, **SIZES)
    assert found.exact
    assert found.floor < 1e-14
    assert found.others[-1].gradient_error == pytest.approx(3.18, abs=0.1), "of four micro-batches of up to 3 rows"


@pytest.mark.slow
def test_layerdrop_does_not_affect_any_row_of_the_report() -> None:
    head = HEADS["seq2seq, BART"]
    columns = []
    for share in (0.0, 0.5):
        model = head.model()
        model.model.encoder.layerdrop = model.model.decoder.layerdrop = share
        found = verify(model, head.rows(30), **SIZES)
        assert found.exact
        columns.append(found.others[-1].gradient_error)
    assert columns[1] == pytest.approx(columns[0], rel=1e-9), "Trainer puts models in train mode before each pass"


def test_dropout_has_no_effect_and_an_adapted_norm_is_exact() -> None:
    model = Normed()
    model.norm = nn.GroupNorm(2, 8)  # type: ignore[assignment]
    found = verify(model, FEATURES, loss_fn=cross_entropy, batch_size=2, effective_batch_size=8, progress=False)
    assert found.exact
    assert found.floor < 1e-14


def test_a_count_that_does_not_match_the_loss_is_found() -> None:
    found = of_head("token classification, RoBERTa", count_items=lambda batch: len(batch["input_ids"]), n_splits=0)
    assert not found.exact
    assert "give `count_items`" in str(found).replace("\n  ", " ")


@pytest.mark.parametrize(
    "more",
    [
        {"padding_free": True},
        {"max_tokens": 30},
        {"max_tokens": "auto"},
        {"planner": False},
        {"gradient_checkpointing": True},
    ],
)
@pytest.mark.slow
def test_other_ways_to_run_are_exact(more: dict[str, Any]) -> None:
    found = of_head(CAUSAL, **more)
    assert found.exact
    assert max(measured.gradient_error or 0.0 for measured in found.splits) < 1e-10


def test_a_collator_that_draws_is_exact() -> None:
    def hides_some(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = one_batch([{"input_ids": row["input_ids"]} for row in rows])
        hidden = (torch.rand(batch["input_ids"].shape) < 0.3) & batch["attention_mask"].bool()
        hidden[:, 0] = True
        return {**batch, "labels": batch["input_ids"].masked_fill(~hidden, -100)}

    assert of_head("masked LM, BERT", data_collator=hides_some, n_splits=1).exact


@pytest.mark.slow
def test_windows_without_loss_items_make_no_update() -> None:
    head = HEADS["token classification, BERT"]
    rows = head.rows(30)
    rows = [row if n % 4 == 0 else {**row, "labels": [-100] * len(row["labels"])} for n, row in enumerate(rows)]
    every = [verify(head.model(), rows, random_seed=seed, **SIZES) for seed in range(4)]
    assert all(every)
    assert any(
        measured.note == "(no row counts in the loss: no update)" for found in every for measured in found.splits
    )
    assert every[0].others[0].loss_error is None, "the mean over nothing is no number"


@pytest.mark.slow
def test_a_model_that_cannot_be_run_in_float64_is_measured_as_it_is() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if self.net.weight.dtype == torch.float64:
                raise RuntimeError("no kernel for double")
            return self.net(x.to(self.net.weight.dtype))

    arguments: dict[str, Any] = {
        "loss_fn": cross_entropy,
        "batch_size": 2,
        "effective_batch_size": 8,
        "progress": False,
    }
    found = verify(Single(), FEATURES, **arguments)
    assert found.exact
    assert (found.dtype, found.autocast) == ("float32", "no")
    assert found.notes == [
        "Not measured in float64: Single cannot run in this type (RuntimeError: no kernel for double)."
    ]
    assert verify(Single().bfloat16(), FEATURES, **arguments).dtype == "float32"
    with pytest.raises(RuntimeError, match="no kernel"):
        verify(Single(), FEATURES, dtype="float64", **arguments)


@pytest.mark.slow
def test_16_bits_are_judged_by_a_tolerance_for_their_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    head = HEADS[BERT]
    bf16, fp16 = (verify(head.model().float(), head.rows(30), mixed_precision=p, **SIZES) for p in ("bf16", "fp16"))
    for found in (bf16, fp16):
        assert found.exact
        assert (found.dtype, found.autocast) in (("float32", "bf16"), ("float32", "fp16"))
        assert 1e-3 <= found.tolerance <= 0.1
    assert 1e-4 < fp16.floor < bf16.floor
    alone = verify(head.model(), head.rows(30), mixed_precision="bf16", **SIZES)
    assert (alone.dtype, alone.tolerance) == ("float64", 1e-10), "which autocast leaves alone"
    monkeypatch.setattr(LossNormalizer, "for_backward", lambda _, contribution: contribution)
    assert not verify(head.model().float(), head.rows(30), mixed_precision="bf16", **SIZES).exact


@pytest.mark.slow
def test_the_dtype_stays_float32_if_float64_does_not_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftaccum.apps.verify.precision.free_per_process", lambda: 200_000)
    found = verify(HEADS[BERT].model().float(), HEADS[BERT].rows(30), **SIZES)
    assert (found.dtype, found.exact) == ("float32", True)
    assert "would not fit in memory" in found.notes[0]


@pytest.mark.slow
def test_fewer_rows_are_used_if_one_batch_does_not_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Reference.loss

    def of_few(self: Reference, batch: dict[str, Tensor], **options: bool) -> Tensor:
        if len(batch["input_ids"]) > 6:
            raise torch.OutOfMemoryError("no memory for so many rows")
        return loss(self, batch, **options)

    monkeypatch.setattr(Reference, "loss", of_few)
    found = verify(HEADS[BERT].model(), HEADS[BERT].rows(30), dtype="model", **SIZES)
    assert found.exact
    assert max(measured.rows for measured in found.splits) == 5
    assert "One batch of the 11 rows of an update does not fit in memory, so only 5 of them" in found.notes[-1]


def test_the_model_and_all_generators_are_left_unchanged() -> None:
    model = with_dropout().eval()
    model.bert.pooler.train()
    model.extra = nn.BatchNorm1d(2)
    for n, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, n) if n % 2 else None
    given = {name: (t, t.data_ptr(), t.clone()) for name, t in (*model.named_parameters(), *model.named_buffers())}
    gradients = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    settings, hooks = model.config.to_dict(), [len(m._forward_pre_hooks) for m in model.modules()]
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    found = verify(model, HEADS[BERT].rows(30), n_splits=1, **SIZES)
    assert found.exact
    assert found.others[-1].gradient_error is not None, "Trainer has had it, too"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        before, at, value = given[name]
        assert tensor is before
        assert tensor.data_ptr() == at
        assert tensor.dtype == value.dtype
        assert torch.equal(tensor, value)
    for name, p in model.named_parameters():
        before, value = gradients[name]
        assert p.grad is before
        assert value is None or torch.equal(p.grad, value)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    assert (settings, hooks) == (model.config.to_dict(), [len(m._forward_pre_hooks) for m in model.modules()])
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(states[2], torch.get_rng_state())


@pytest.mark.slow
def test_the_result_can_be_shown_as_a_table_and_as_json(tmp_path: Path) -> None:
    found = of_head(BERT)
    assert "Rows of an update: 11 (3 × 4)" in str(found)
    assert "EXACT: however the rows are split, gradient and loss are those of one batch." in str(found)
    assert max(map(len, str(found).splitlines())) < 120
    found.save(tmp_path / "found.json")
    assert Verification.load(tmp_path / "found.json") == found
    read = json.loads(found.to_json())
    assert read["exact"] is True
    assert read["splits"][0]["split"] == "as trained"
    assert read["versions"].keys() == {"ftaccum", "torch", "transformers", "accelerate"}


def test_all_faults_are_reported_at_once() -> None:
    with pytest.raises(SettingsError) as told:
        verify(HEADS[BERT].model(), HEADS[BERT].rows(), batch_size=0, n_splits=-1, dtype="float16", tolerance=0.0)
    assert [fault.split()[0] for fault in told.value.faults] == ["`n_splits`", "`dtype`", "`tolerance`", "`batch_size`"]
    with pytest.raises(SettingsError, match="which autocast does not cast"):
        verify(HEADS[BERT].model(), HEADS[BERT].rows(), dtype="float64", use_amp=True)
    with pytest.raises(SettingsError, match="must be a number in `verify`") as told:
        verify(HEADS[BERT].model(), HEADS[BERT].rows(), batch_size="auto")  # type: ignore[arg-type]
    assert len(told.value.faults) == 1


def test_splits_have_every_row_once_and_as_many_passes_on_every_process() -> None:
    for processes in (1, 2, 3):
        planner = MicroBatchPlanner(BatchLimits(3), None, processes)
        for split in splits_of(tuple(range(100, 111)), lambda rows, c: c.split(rows), planner, 3 * processes, 4, 0):
            assert sorted(row for piece in split.slices for row in piece.rows) == sorted(split.rows)
            assert len({len(share) for share in split.by_process}) == 1
    short = {
        len(s.rows)
        for s in splits_of(
            tuple(range(64)), lambda r, c: c.split(r), MicroBatchPlanner(BatchLimits(1), None, 1), 1, 0, 0
        )
    }
    assert short == {64, 1, 22, 42, 63}


def test_rows_keep_their_names_when_some_are_tokenized() -> None:
    rows = as_rows(Dataset.from_dict({"text": [str(n) for n in range(9)]}), "data").subset([2, 5, 8])
    assert rows.table["text"][:] == ["2", "5", "8"]
    made = rows.replaced([{"input_ids": [n]} for n in range(3)]).subset([1, 2])
    assert made.name_of(0) == "row 5"
    assert as_rows(made, "data") is made


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return options that name a tiny model and 3,000 rows of raw text."""
    folder = tmp_path_factory.mktemp("tiny")
    HEADS[BERT].model().float().save_pretrained(folder / "model")
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a"])
    )
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder / "model")
    lines = [f"{'a ' * (n % 5)}{('good', 'bad')[n % 2]} film,{n % 3}" for n in range(3000)]
    (folder / "rows.csv").write_text("\n".join(["text,label", *lines]))
    return ["verify", "--model", str(folder / "model"), "--data", str(folder / "rows.csv"), "--no_progress"]


@pytest.mark.slow
def test_the_command_prints_a_result_and_refuses_bad_options(
    named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # so that bars are drawn
    command = [*(word for word in named if word != "--no_progress"), "--batch_size", "2"]
    command += ["--gradient_accumulation_steps", "4"]
    assert main([*command, "--json", "-"]) == 0
    shown = capfd.readouterr()
    assert json.loads(shown.out)["effective_batch_size"] == 8, "nothing else goes to standard output"
    assert "1024/1024" in shown.err, "of 3,000 rows, no more are tokenized"
    assert main([*command, "--tolerance", "1e-300", "--json", str(tmp_path / "found.json"), "--n_splits", "0"]) == 1
    assert "NOT EXACT" in capfd.readouterr().out
    assert not Verification.load(tmp_path / "found.json").exact
    for words, sentence in (
        (["--n_splits", "-1"], "`n_splits` must be a non-negative integer"),
        (["--json", str(tmp_path / "absent" / "found.json")], "in a folder that does not exist"),
        (["--n_epochs", "3"], "There is no option '--n_epochs'."),
    ):
        assert main([*command, *words]) == 2
        assert sentence in capfd.readouterr().err
    assert main(["verify"]) == 2


@pytest.mark.slow
@pytest.mark.processes
def test_verify_finds_exact_and_inexact_losses_on_two_processes(two_processes: Callable[..., str]) -> None:
    printed = two_processes("verify_of_two.py")
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("FOUND "))[6:])
    assert found["exact"] == dict.fromkeys([CAUSAL, BERT, QUESTIONS, "token classification, BERT"], True)
    assert max(found["errors"]) < 1e-10
    assert found["broken"] == found["normed"] == found["one_is_off"] == [False, False]
    assert found["trainer"] == "(shown on one process only)"


def test_gradients_of_a_model_spread_over_devices_are_left_unchanged() -> None:
    model: Any = nn.Linear(3, 2)
    model.hf_device_map = {"": "cpu"}
    model.weight.grad = torch.ones(2, 3)
    rows = [(torch.randn(3), n % 2) for n in range(8)]
    assert verify(model, rows, loss_fn=nn.CrossEntropyLoss(), batch_size=2, progress=False).exact
    assert torch.equal(model.weight.grad, torch.ones(2, 3))


def test_float16_weights_can_be_verified_under_fp16_autocast() -> None:
    model, rows = nn.Linear(3, 2).half(), [(torch.randn(3).half(), n % 2) for n in range(8)]
    assert verify(
        model, rows, loss_fn=nn.CrossEntropyLoss(), batch_size=2, mixed_precision="fp16", progress=False
    ).splits
