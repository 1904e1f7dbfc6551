"""Measuring the noise scale in runs: against plain PyTorch, and without an effect on the updates."""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ftaccum import Result, plan, test_fine_tuning
from ftaccum.accumulation.accumulator import GradientAccumulator
from ftaccum.data.loader import LocalRows, MicroBatch
from ftaccum.objective.signed_sums import add_signed
from ftaccum.planning.halves import MeasuredWindows
from ftaccum.planning.micro_batches import MicroBatchRows
from ftaccum.runtime.accelerator import accelerator_session
from ftaccum.runtime.gradients.plain import GradientStrategy
from ftaccum.runtime.process_group import SINGLE
from ftaccum.settings.runtime import Runtime
from ftaccum.tracking.ledger_file import LedgerFile
from ftaccum.tracking.run_record import RunRecord
from ftaccum.training.build_noise import build_measured_windows
from heads import HEADS, RecordingOptimizer, all_in_float64, one_batch_gradient
from interrupted import CutOff, fine_tuned, ledger_of
from invariance import difference, trained
from running_out import limited
from test_data_faults import loader_of
from test_trackers import Told

RAGGED, CLASSES, PADDED = "token classification, BERT", "sequence classification, BERT", "question answering, BERT"
MEASURED: dict[str, Any] = {"effective_batch_size": 16, "noise_scale": 1, "audit": False, "verbosity": "quiet"}


class SquaredError:
    """An objective: the mean squared error."""

    terms = ("loss",)
    modules: Sequence[nn.Module] = ()
    window = labelled_head = None
    report = SimpleNamespace(in_training=SimpleNamespace(complaint=None))

    def attributes_before_lazy_passes(self) -> None:
        """Return None: no layer is lazy."""

    def means(self, model: nn.Module, batch: Any, *_: Any) -> tuple[dict[str, Tensor], None]:
        return {"loss": ((model(batch[0]).squeeze(1) - batch[1]) ** 2).mean()}, None


class Logged(Told):
    """A tracker that keeps the last value of each name."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Any] = {}

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        super().log(values, step)
        self.values |= values


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with accelerator_session(Runtime(), 0, None) as made:
        yield made


def test_the_mean_over_all_halves_is_the_mean_product_of_two_rows(accelerator: Accelerator) -> None:
    draw, objective = torch.Generator().manual_seed(0), cast(Any, SquaredError())
    model = nn.Linear(5, 1, dtype=torch.float64)
    x, y = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((8, 5), (8,)))
    rows = torch.stack(
        [torch.cat([p.flatten() for p in torch.autograd.grad((model(x[[n]]) - y[n]) ** 2, list(model.parameters()))])
         for n in range(8)]
    )  # fmt: skip
    products = rows @ rows.T
    strategy = GradientStrategy(torch.optim.SGD(model.parameters()))
    accumulator = GradientAccumulator(accelerator, model, objective, strategy, SINGLE)
    found = []
    for first in itertools.combinations(range(8), 4):
        halves = (list(first), [n for n in range(8) if n not in first])
        pieces = [half[part] for half in halves for part in (slice(1), slice(1, None))]
        window = [MicroBatch((x[p], y[p]), {"loss": len(p)}, ("loss",), MicroBatchRows(), 0, 0) for p in pieces]
        accumulated = accumulator.accumulate(window, n_first=2)
        noise = accumulated.read_with(strategy.clip(math.inf)).noise
        assert noise is not None
        assert noise.power == pytest.approx(products.mean().item(), rel=1e-12)
        found.append(noise.agreement)
        accumulator.zero_gradients()
    assert len(found) == 70
    wanted = (products.sum() - products.trace()) / 56
    assert sum(found) / 70 == pytest.approx(wanted.item(), rel=1e-12)
    assert max(found) - min(found) > 0.1 * abs(wanted)


def expected(name: str, n_rows: int, index: int) -> tuple[float, float]:
    """Return the agreement and the power of a window of 20 rows, from one batch of each half."""
    rows, model = HEADS[name].rows(n_rows), HEADS[name].model()
    planned = plan(n_rows, validation_split=0.0, effective_batch_size=20, n_epochs=1)
    window = [window for epoch in planned.epochs for window in planned.windows(epoch)][index]
    halves = MeasuredWindows(1, 42).halves(window)
    assert halves is not None

    def gradient(places: Sequence[int]) -> Tensor:
        found = one_batch_gradient(model, [rows[window.rows[place]] for place in places])
        return torch.cat([found[key].flatten() for key in sorted(found)])

    with all_in_float64():
        first, second, whole = (gradient(places) for places in (*halves, range(20)))
    return float(first @ second), float(whole @ whole)


def noise_entries(name: str, folder: Path, **arguments: Any) -> list[Any]:
    """Return the entries of a run whose weights stay the same, on windows of 20 rows."""
    model = arguments.pop("model", None) or HEADS[name].model()
    with nullcontext() if arguments.get("mixed_precision") else all_in_float64():
        test_fine_tuning(
            model, train_data=HEADS[name].rows(41), validation_split=0.0, n_epochs=1, progress=False,
            optimizer=RecordingOptimizer(model), output_dir=str(folder),
            **MEASURED | {"effective_batch_size": 20, "batch_size": 4} | arguments,
        )  # fmt: skip
    return LedgerFile.read(folder / "ledger.jsonl").ledger.noise_scales


@pytest.mark.parametrize("name", [RAGGED, CLASSES])
def test_the_agreement_is_the_product_of_the_gradients_of_two_batches(name: str, tmp_path: Path) -> None:
    """Gradients of embeddings are sparse here, and gradients are clipped. The last window has one row."""
    one, two = noise_entries(name, tmp_path, gradient_clip_norm=0.01)
    assert [one.noise_scale, two.noise_scale] == [1, 2]
    for index, entry in enumerate((one, two)):
        assert (entry.agreement, entry.power) == pytest.approx(expected(name, 41, index), rel=1e-9)
    rows = HEADS[name].rows(41)
    assert one.tokens + two.tokens == pytest.approx(sum(len(row["input_ids"]) for row in rows), abs=20)


def test_the_scale_of_fp16_does_not_change_the_agreement(tmp_path: Path) -> None:
    model = HEADS[CLASSES].model().float()
    (one, _) = noise_entries(CLASSES, tmp_path, model=model, mixed_precision="fp16")
    assert (one.agreement, one.power) == pytest.approx(expected(CLASSES, 41, 0), rel=0.05)


def test_sums_in_float32_are_measured(tmp_path: Path) -> None:
    model = HEADS[CLASSES].model().to(torch.bfloat16)
    (one, _) = noise_entries(CLASSES, tmp_path, model=model, accumulate_in_fp32=True)
    assert (one.agreement, one.power) == pytest.approx(expected(CLASSES, 41, 0), rel=0.15)


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "one row": (RAGGED, {"batch_size": 1}),
    "not planned": (CLASSES, {"batch_size": 3, "planner": False}),
    "by tokens": (RAGGED, {"batch_size": 4, "max_tokens": 40}),
    "padding counts": (PADDED, {"batch_size": 4}),
    "padding-free": ("causal LM, Llama", {"batch_size": 4, "padding_free": True}),
    "out of memory": (CLASSES, {"batch_size": 16, "most": 5}),
}


def test_dummies_stay_in_their_half() -> None:
    row, dummy = MicroBatchRows.of((3, 4, 5, 6), (0,)), MicroBatchRows()
    share = LocalRows((3, 4, 5, 6), [row, dummy, row, row, dummy], (0,), n_first=2)
    loader = loader_of([(torch.zeros(2), torch.zeros(1))] * 9)
    (loaded,) = loader.load([share])
    assert [micro.is_dummy for micro in loaded] == [True, False, True, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_measuring_changes_no_update(way: str, tmp_path: Path) -> None:
    name, arguments = WAYS[way]
    most, size = arguments.get("most", 99), arguments["batch_size"]
    given = MEASURED | {key: value for key, value in arguments.items() if key not in ("most", "batch_size")}
    without = trained(name, 16, **MEASURED | {"noise_scale": False})
    measured = trained(name, size, lambda model: limited(model, most), output_dir=str(tmp_path), **given)
    assert difference(without, measured) < 1e-9
    assert (measured[1].out_of_memory > 0) == (most < 16)
    entries = LedgerFile.read(tmp_path / "ledger.jsonl").ledger.noise_scales
    whole = trained(name, 16, output_dir=str(tmp_path / "whole"), **MEASURED)
    assert difference(without, whole) < 1e-9
    wanted = LedgerFile.read(tmp_path / "whole" / "ledger.jsonl").ledger.noise_scales
    assert [entry.noise_scale for entry in entries] == [1, 3]  # of 16, 15, 16 and 15 rows
    for entry, same in zip(entries, wanted, strict=True):
        assert (entry.agreement, entry.power) == pytest.approx((same.agreement, same.power), rel=1e-9)


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_measure_the_same(two_processes: Callable[..., str], tmp_path: Path) -> None:
    runs = {name: trained(name, 16, output_dir=str(tmp_path / name), **MEASURED) for name in (RAGGED, CLASSES)}
    known = {name: LedgerFile.read(tmp_path / name / "ledger.jsonl").ledger.noise_scales for name in runs}
    torch.save((runs, known), tmp_path / "alone.pt")
    printed = two_processes("noise_of_two.py", str(tmp_path / "alone.pt"), str(tmp_path / "two"))
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("FOUND "))[6:])
    assert found.keys() == {f"{name}, {size}" for name in runs for size in (1, 4)} | {f"{CLASSES}, out of memory"}
    assert max(max(each["off"], each["measured"]) for each in found.values()) < 1e-9, found


@pytest.mark.slow
def test_a_resumed_run_measures_the_same_updates(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "batch_size": 4, "effective_batch_size": 16, "remainder": "carry", "noise_scale": 2, "checkpoint_every": 3,
        "audit": False,
    }  # fmt: skip
    whole = fine_tuned(output_dir=str(tmp_path / "whole"), **arguments)
    with pytest.raises(CutOff):
        fine_tuned(cut_off_at=4, output_dir=str(tmp_path / "cut"), **arguments)
    again = fine_tuned(output_dir=str(tmp_path / "cut"), resume="auto", **arguments)
    assert whole.differences(again) == []
    assert ledger_of(tmp_path / "whole") == ledger_of(tmp_path / "cut")
    assert whole.result.noise_scale is not None
    assert whole.result.noise_scale["measured_updates"] == 3
    assert repr(again.result.noise_scale) == repr(whole.result.noise_scale)


def test_the_estimate_is_in_the_result_the_table_and_the_trackers(tmp_path: Path) -> None:
    tracker = Logged()
    head = HEADS[CLASSES]
    result = test_fine_tuning(
        head.model(), train_data=head.rows(34), validation_split=0.0, n_epochs=8, batch_size=16, progress=False,
        learning_rate=1e-4, output_dir=str(tmp_path), log_with=tracker, **MEASURED,
    )  # fmt: skip
    assert result.noise_scale is not None
    assert result.noise_scale["measured_updates"] == 16
    assert "noise scale" in str(result)
    loaded = Result.load(tmp_path)
    assert loaded.noise_scale is not None
    assert 0 < loaded.noise_scale["signal_share_upper"] == result.noise_scale["signal_share_upper"]
    assert str(loaded)
    names = ("signal_share_lower", "signal_share_upper", "noise_rows_lower", "agreement", "power")
    assert {f"noise_scale/{name}" for name in names} <= tracker.values.keys()
    entry = LedgerFile.read(tmp_path / "ledger.jsonl").ledger.noise_scales[-1]
    assert entry.training_rows == 34


def measured_windows(noise_scale: Any = 3, terms: Any = ("loss",), **changed: Any) -> MeasuredWindows:
    """Return the windows that a run of 100 updates of 16 rows measures, unless something is changed."""
    ways, in_training = dict.fromkeys(terms, changed.pop("way", "rows")), SimpleNamespace(complaint=None)
    report = SimpleNamespace(balanced=(), inexact=list, ways=ways, in_training=in_training)
    vars(report).update(changed.pop("report", {}))
    objective: Any = SimpleNamespace(window=changed.pop("window", None), report=report, terms=terms)
    runtime = Runtime(noise_scale=noise_scale, deterministic=changed.pop("deterministic", False))
    weights = [nn.Parameter(torch.zeros(1))]
    optimizer, is_sharded = changed.pop("optimizer", torch.optim.SGD)(weights), changed.pop("is_sharded", False)
    planned = plan(1600, validation_split=0.0, n_epochs=1, **{"effective_batch_size": 16} | changed)
    return build_measured_windows(runtime, planned, objective, optimizer, is_sharded=is_sharded)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"window": object()}, "reads all rows of an update together"),
        ({"report": {"balanced": ("router",)}}, "reads all rows of an update together"),
        ({"report": {"inexact": lambda: ["it mixes rows"]}}, "only approximates one large batch"),
        ({"report": {"in_training": SimpleNamespace(complaint="Expected more than 1 value")}}, "on a single row"),
        ({"report": {"ways": {"one": "labels", "other": "rows"}}}, "has several terms"),
        ({"terms": ("one", "other"), "way": "count_items"}, "has several terms"),
        ({"optimizer": torch.optim.LBFGS}, "computes the gradient of an update several times"),
        ({"is_sharded": True}, "the model is sharded"),
        ({"effective_batch_size": 12}, "an update has 12 rows, fewer than 16"),
        ({"noise_scale": False}, "`noise_scale` is False"),
        ({"noise_scale": "auto", "deterministic": True}, "measures nothing with `deterministic`"),
        ({"noise_scale": "auto", "effective_batch_size": 32}, "the run has 50 updates, and `noise_scale` 'auto' needs"),
        (
            {"noise_scale": "auto", "effective_batch_size": 400},
            "the run has 4 updates. An estimate needs at least 8, and 'auto' 80. Train longer",
        ),
        (
            {"noise_scale": 9, "effective_batch_size": 400},
            "the run has 4 updates. An estimate needs at least 8. Train longer",
        ),
        ({"noise_scale": 101}, "the first measurement would be at update 101"),
    ],
)
def test_it_is_not_measured_where_it_would_be_wrong_or_useless(changed: dict[str, Any], reason: str) -> None:
    measured = measured_windows(**changed)
    assert measured.every is None
    assert reason in measured.reason


def test_it_is_measured_elsewhere() -> None:
    assert (measured_windows().every, measured_windows().reason) == (3, "")
    assert measured_windows(deterministic=True).every == 3
    assert measured_windows("auto").every == 10
    assert measured_windows(terms=("one", "other")).every == 3


def test_a_run_logs_and_records_why_it_does_not_measure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    head = HEADS[CLASSES]
    result = test_fine_tuning(
        head.model(), train_data=head.rows(8), validation_split=0.0, n_epochs=1, effective_batch_size=8, audit=False,
        progress=False, verbosity="debug", output_dir=str(tmp_path),
    )  # fmt: skip
    assert result.noise_scale is None
    assert "noise scale is not measured: an update has 8 rows, fewer than 16." in capfd.readouterr().err
    record = RunRecord.read(tmp_path / "run.json")
    assert record is not None
    assert record.noise_scale_reason == "an update has 8 rows, fewer than 16. Give a larger `effective_batch_size`"


def test_signed_sums_are_linear_and_keep_products(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    one = torch.randn(2_100_000, generator=draw)
    other = one + torch.randn(2_100_000, generator=draw)

    def sums(numbers: Tensor, position: int = 0, parts: int = 1) -> Tensor:
        found = torch.zeros(1 << 16, dtype=torch.float64)
        for part in numbers.chunk(parts) if parts > 1 else [numbers]:
            add_signed(found, part, position)
            position += part.numel()
        return found

    a, b = sums(one), sums(other)
    assert float(a @ b) == pytest.approx(float(one.double() @ other.double()), rel=0.02)
    assert float(sums(torch.ones(2_100_000)).square().sum()) == pytest.approx(2_100_000, rel=0.03)
    torch.testing.assert_close(sums(one.double() + other.double()), a + b)
    torch.testing.assert_close(sums(one, parts=7), a)
    monkeypatch.setattr("ftaccum.objective.signed_sums._LARGEST", 1 << 20)  # as on a device
    torch.testing.assert_close(sums(one, parts=7), a)
    turned = torch.randn(9, 2, generator=draw)
    assert torch.equal(sums(torch.view_as_complex(turned), 3), sums(turned, 3))
    table = torch.zeros(9, 4).index_add_(0, torch.tensor([2, 5]), torch.ones(2, 4))
    assert torch.equal(sums(table.to_sparse(1), 3), sums(table, 3))


class Branches(nn.Module):
    """A model with a layer for each of two kinds of rows, which no other rows use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 4)
        self.of_kinds = nn.ModuleList(nn.Linear(8, 4) for _ in range(2))
        self.double()

    def forward(self, input_ids: Tensor, kind: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.embedding(input_ids)
        logits = self.head(hidden)
        for number, layer in enumerate(self.of_kinds):
            if (kind == number).any():
                logits = logits + layer(hidden) * (kind == number)[:, None, None]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def test_a_half_without_loss_items_changes_no_weight_that_the_other_half_leaves_out() -> None:
    draw, rows = torch.Generator().manual_seed(1), []
    for n in range(96):
        ids = torch.randint(1, 20, (3 + n % 4,), generator=draw)
        labels = torch.randint(4, ids.shape, generator=draw) if n % 10 == 0 else torch.full_like(ids, -100)
        rows.append({"input_ids": ids, "labels": labels, "kind": 2 if n % 10 else n % 20 // 10})

    def weights(every: Any, batch_size: int) -> Tensor:
        model = Branches()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3)
        test_fine_tuning(
            model, train_data=rows, optimizer=optimizer, batch_size=batch_size, n_epochs=2, validation_split=0.0,
            progress=False, **MEASURED | {"noise_scale": every},
        )  # fmt: skip
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    wanted = weights(False, 16)
    for batch_size in (1, 3, 16):
        torch.testing.assert_close(weights(1, batch_size), wanted, rtol=0, atol=1e-12)


def test_the_estimate_is_for_the_rows_of_a_full_update_or_of_all_data() -> None:
    head = HEADS[CLASSES]
    for n_rows, effective, wanted in ((56, 32, 32), (20, 32, 20)):
        result = test_fine_tuning(
            head.model(), train_data=head.rows(n_rows), batch_size=4, n_epochs=2, validation_split=0.0, progress=False,
            **MEASURED | {"effective_batch_size": effective},
        )  # fmt: skip
        assert result.noise_scale is not None
        assert result.noise_scale["rows"] == wanted
