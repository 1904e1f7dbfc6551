"""The way that a window is cut, collated, laid out and compiled changes time and memory, never the update."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch
from torch import Tensor, nn

from exactness import accumulated_gradients
from ftaccum import DataError, SettingsError, plan, test_fine_tuning
from ftaccum.accumulation.accumulator import GradientAccumulator
from ftaccum.data.convert import as_rows
from ftaccum.data.loader import Loader, LocalRows, MicroBatch
from ftaccum.data.prefetch import WindowLoader
from ftaccum.data.probe_rows import sample_positions
from ftaccum.data.validation import _columns_of, _memory_besides_ids
from ftaccum.planning.batch_size import BatchSizes
from ftaccum.planning.micro_batches import BatchLimits, CostModel, MicroBatchPlanner, MicroBatchRows
from ftaccum.planning.plan import Plan
from ftaccum.runtime.model_context import compile_model
from ftaccum.training.loop import TrainingLoop
from heads import HEADS, Row, all_in_float64, one_batch, one_batch_gradient, relative_error
from invariance import NAMES, difference, trained

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from host_syncs import HostSyncs

CAUSAL = "causal LM, Llama"
WAYS: dict[str, dict[str, Any]] = {
    "planner off": {"planner": False},
    "long passes are cheap": {"planner_costs": (1000.0, 1.0, 0.0)},
    "padding is dear": {"planner_costs": (0.0, 1.0, 0.1)},
    "max_tokens": {"max_tokens": 40},
    "max_tokens, planner off": {"max_tokens": 40, "planner": False},
    "max_tokens of 4 longest rows": {"max_tokens": "auto"},
    "workers": {"num_workers": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_way_to_cut_changes_the_update(name: str) -> None:
    in_one = trained(name, 12, planner=False)
    passes = set()
    for way, arguments in WAYS.items():
        run = trained(name, 4, **arguments)
        assert difference(in_one, run) < 1e-9, way
        passes.add(run[1].passes_per_update)
    assert len(passes) >= 3  # the cuts differ


@pytest.mark.slow
def test_rows_of_each_update_are_the_same_with_the_planner_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the cut, an update gets the rows of the plan."""

    def updates(**arguments: Any) -> list[list[int]]:
        seen: list[list[int]] = []
        local_rows = WindowLoader._local_rows

        def watched(window_loader: WindowLoader, window: Any) -> Any:
            found = local_rows(window_loader, window)
            dealt = window_loader.loader.cut(window.rows, window_loader.planner)
            seen.append(sorted(row for part in dealt for piece in part for row in piece.rows))
            assert sorted(found.window) == seen[-1] == sorted(window.rows)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(WindowLoader, "_local_rows", watched)
            trained(NAMES[1], arguments.pop("batch_size", 4), **arguments)
        return seen

    planned, *others = updates(), *(updates(**way) for way in ({"planner": False}, {"max_tokens": 50}))
    assert len(planned) == 6
    assert all(other == planned for other in others)
    assert updates(batch_size=3) == planned


@pytest.mark.slow
def test_padding_shrinks_with_the_planner() -> None:
    with_it, without = (trained(NAMES[1], 3, planner=planner)[1] for planner in (True, False))
    assert with_it.padding_fraction < 0.7 * without.padding_fraction


def test_max_tokens_replaces_the_cap_on_rows_with_one_on_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    taken = GradientAccumulator._run

    def watched(accumulator: GradientAccumulator, index: int, micro: MicroBatch, *others: Any) -> None:
        sizes.append(micro.positions)
        taken(accumulator, index, micro, *others)

    monkeypatch.setattr(GradientAccumulator, "_run", watched)
    few = trained(NAMES[1], 1, max_tokens=60)[1]
    assert few.gradient_accumulation_steps == 12
    assert few.passes_per_update < 6
    assert 40 < max(sizes) <= 60


@pytest.mark.parametrize("more", [{}, {"padding_free": True}, {"batch_size": "auto"}], ids=str)
def test_automatic_max_tokens_make_fewer_passes_for_the_gradient_of_one_batch(
    more: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftaccum.training.build_plan.largest_batch", lambda *_, **__: 2)
    head, rows = HEADS[CAUSAL], HEADS[CAUSAL].rows(12)
    longest, positions, sizes = max(len(row["input_ids"]) for row in rows), GradientAccumulator._run, list[list[int]]()

    def watched(accumulator: GradientAccumulator, index: int, micro: MicroBatch, *others: Any) -> None:
        sizes[-1].append(micro.positions)
        positions(accumulator, index, micro, *others)

    monkeypatch.setattr(GradientAccumulator, "_run", watched)
    with all_in_float64():
        wanted = one_batch_gradient(head.model(), rows)
        for cap in (None, "auto"):
            sizes.append([])
            arguments = {"batch_size": 2, "effective_batch_size": 12, "max_tokens": cap, "verbosity": "normal"} | more
            (found,) = accumulated_gradients(head.model(), rows, audit=False, **arguments)
            assert relative_error(found, wanted) < 1e-11
    few, fewer = sizes
    assert len(fewer) < len(few)
    assert max(fewer) <= 2 * longest
    found_by = ", the most that fit in memory or in an update," if more.get("batch_size") == "auto" else ""
    assert f"at most {2 * longest} tokens (batch_size 2{found_by} × longest row {longest});" in capsys.readouterr().out


class Mixing(nn.Module):
    """A classifier with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(99, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.norm(self.embed(input_ids).mean(1)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class WithAnswers(Mixing):
    """A classifier of two sequences."""

    def forward(self, input_ids: Tensor, labels: Tensor, answer: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        assert len(answer) == len(input_ids)
        return super().forward(input_ids, labels)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("seq2seq, T5", "`labels` is a second sequence, for the decoder"),
        ("image classification, ViT", "there are no token ids"),
        ("multiple choice, BERT", "`input_ids` has 2 dimensions in each row, not one"),
    ],
)
def test_automatic_max_tokens_are_refused_where_tokens_do_not_tell_the_memory(name: str, words: str) -> None:
    with pytest.raises(DataError, match=rf"`max_tokens` is 'auto'\. In `train_data`, {words}.* Omit `max_tokens`"):
        test_fine_tuning(HEADS[name].model(), train_data=HEADS[name].rows(9), max_tokens="auto")


def test_automatic_max_tokens_are_refused_for_rows_with_a_second_sequence() -> None:
    rows = [{**row, "answer": [5] * 77} for row in HEADS[NAMES[1]].rows(9)]
    with pytest.raises(
        DataError, match=r"`answer` has the shape \(1, 77\) but `input_ids` has \(1, \d+\), so the number"
    ):
        test_fine_tuning(WithAnswers(), train_data=rows, max_tokens="auto")


ONE_ROW = torch.ones(1, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("columns", "refused"),
    [
        ({"attention_mask": ONE_ROW, "labels": ONE_ROW, "bbox": torch.ones(1, 3, 4)}, ""),
        ({"labels": torch.tensor([1]), "scores": torch.ones(1)}, ""),
        ({"labels": torch.ones(1, 7)}, ""),  # several classes, or targets of a regression
        ({"labels": torch.ones(1, 7, dtype=torch.long)}, "labels"),
        ({"context": torch.ones(1, 7, dtype=torch.long)}, "context"),
        ({"pixel_values": torch.ones(1, 1, 8, 8), "labels": ONE_ROW}, "pixel_values"),
    ],
    ids=["sequences", "classes", "floats", "labels", "context", "image"],
)
def test_columns_with_a_size_of_their_own_are_found(columns: dict[str, Tensor], refused: str) -> None:
    found = _memory_besides_ids({"input_ids": ONE_ROW, **columns}, decodes=False)
    assert found.startswith(f"`{refused}` has the shape") if refused else not found


def test_all_elements_of_a_tuple_are_sized() -> None:
    columns = _columns_of((ONE_ROW, torch.ones(1, 5, dtype=torch.long)))
    assert _memory_besides_ids(columns, decodes=False).startswith("`batch[1]` has the shape (1, 5)")
    assert not _memory_besides_ids(_columns_of((ONE_ROW, torch.tensor([1]))), decodes=False)


def test_automatic_max_tokens_are_refused_where_rows_mix() -> None:
    rows = HEADS[NAMES[1]].rows(24)
    with pytest.raises(SettingsError, match=r"`max_tokens` is 'auto', but the loss of a row depends on.*norm"):
        test_fine_tuning(Mixing().double(), train_data=rows, max_tokens="auto", effective_batch_size=8)


def test_a_validation_row_may_be_longer_than_automatic_max_tokens() -> None:
    head = HEADS[CAUSAL]
    long = {"input_ids": list(range(3, 43)), "labels": list(range(3, 43))}
    result = test_fine_tuning(
        head.model(), train_data=head.rows(4), val_data=[long], batch_size=1, effective_batch_size=4, n_epochs=1,
        max_tokens="auto", progress=False, verbosity="quiet", audit=False,
    )  # fmt: skip
    assert len(result.val_loss_history) == 1


def test_max_tokens_is_refused_with_a_collator_that_pads_further() -> None:
    def to_64(rows: list[Row]) -> dict[str, Tensor]:
        padded = [nn.functional.pad(torch.tensor(row["input_ids"]), (0, 64 - len(row["input_ids"]))) for row in rows]
        return {"input_ids": torch.stack(padded), "labels": torch.tensor([row["labels"] for row in rows])}

    head = HEADS["sequence classification, BERT"]
    with pytest.raises(DataError, match="`data_collator` returns 64 tokens for row"):
        test_fine_tuning(head.model(), train_data=head.rows(20), data_collator=to_64, max_tokens=400)


def test_max_tokens_below_a_row_is_an_error_with_the_row() -> None:
    rows = HEADS[CAUSAL].rows(9)
    longest = max(range(9), key=lambda n: len(rows[n]["input_ids"]))
    with pytest.raises(DataError, match=rf"row {longest} has \d+ tokens, but `max_tokens` is 4"):
        test_fine_tuning(HEADS[CAUSAL].model(), train_data=rows, max_tokens=4, validation_split=0.0)


def test_max_tokens_needs_lengths() -> None:
    class Unknown(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 9

        def __getitem__(self, n: int) -> Row:
            return HEADS[CAUSAL].rows(9)[n]

    with pytest.raises(DataError, match="`max_tokens` needs the lengths of the rows"):
        test_fine_tuning(HEADS[CAUSAL].model(), train_data=Unknown(), max_tokens=400)


@pytest.mark.parametrize(
    "batch_size", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(12, marks=pytest.mark.slow)]
)
def test_padding_free_batches_change_nothing(batch_size: int) -> None:
    padded, packed = trained(CAUSAL, 4), trained(CAUSAL, batch_size, padding_free=True)
    assert packed[1].padding_fraction == 0 < padded[1].padding_fraction
    assert difference(padded, packed) < 1e-9


def test_rows_without_tokens_are_packed_and_add_nothing_to_the_loss() -> None:
    head = HEADS[CAUSAL]
    rows = [*head.rows(5), {"input_ids": [], "labels": []}]
    with all_in_float64():
        found = accumulated_gradients(head.model(), rows, batch_size=6, padding_free=True)
        wanted = one_batch_gradient(head.model(), rows[:5])
    assert relative_error(found[0], wanted) < 1e-10


def test_padding_free_is_refused_where_rows_would_see_each_other() -> None:
    head = HEADS[CAUSAL]

    class Blurring(type(head.model())):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, position_ids: Any = None, labels: Any = None, **rest: Any) -> Any:
            del position_ids  # drops the starts of rows
            return super().forward(input_ids, labels=labels, **rest)

    with pytest.raises(SettingsError, match="lets concatenated rows attend to each other, which changes their loss"):
        test_fine_tuning(Blurring(head.model().config), train_data=head.rows(9), padding_free=True)


def test_padding_free_is_refused_for_other_heads() -> None:
    head = HEADS["sequence classification, BERT"]
    with pytest.raises(
        SettingsError, match="BertForSequenceClassification cannot do without padding: it is not a causal language"
    ):
        test_fine_tuning(head.model(), train_data=head.rows(9), padding_free=True)


def test_a_faulty_row_is_named_in_a_padding_free_batch() -> None:
    rows = HEADS[CAUSAL].rows(200)
    windows = plan(200, batch_size=4, validation_split=0.0).windows(0)
    looked_at = sample_positions(as_rows(rows, "train_data"))
    faulty = next(window.rows[2] for window in windows if window.rows[2] not in looked_at)
    rows[faulty] = {**rows[faulty], "input_ids": [*rows[faulty]["input_ids"][:-1], 1000]}
    with pytest.raises(DataError, match=f"row {faulty} has the token id 1000"):
        test_fine_tuning(
            HEADS[CAUSAL].model(), train_data=rows, padding_free=True, planner=False, validation_split=0.0,
            progress=False,
        )  # fmt: skip


@pytest.mark.slow
def test_a_compiled_model_takes_the_same_updates_in_few_graphs() -> None:
    """Equal up to float32's rounding, since the compiled head computes its loss in float32."""
    from torch._dynamo.utils import counters

    plain = trained(CAUSAL, 4)
    counters.clear()
    in_graphs = trained(CAUSAL, 4, compile=True)
    assert difference(plain, in_graphs) < 1e-6
    assert 0 < counters["stats"]["unique_graphs"] <= 6


def test_the_compiled_call_of_a_model_is_restored() -> None:
    model = HEADS[CAUSAL].model()
    for mine in (None, torch.compile(model._call_impl)):
        model._compiled_call_impl = mine
        with compile_model(model):
            assert model._compiled_call_impl not in (None, mine)
        assert model._compiled_call_impl is mine


def test_the_key_value_cache_setting_of_a_model_is_restored() -> None:
    model = HEADS[CAUSAL].model()
    assert model.config.use_cache
    during: list[bool] = []
    model.register_forward_pre_hook(lambda *_: during.append(model.config.use_cache))
    test_fine_tuning(model, train_data=HEADS[CAUSAL].rows(9), n_epochs=1, progress=False)
    assert not any(during)
    assert model.config.use_cache


def test_a_faulty_row_found_while_prefetching_does_not_lose_the_current_update() -> None:
    class Breaking(torch.utils.data.Dataset):
        """Rows that fail after 8 more reads, counted from the first update."""

        fetched = 0

        def __len__(self) -> int:
            return 40

        def __getitem__(self, n: int) -> Row:
            Breaking.fetched += len(taken) > 0
            if Breaking.fetched > 8:
                raise ValueError("the disk is gone")
            return HEADS[NAMES[1]].rows(40)[n]

    taken: list[int] = []

    class ItemCounter(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            taken.append(1)
            super().step(closure)

    with pytest.raises(DataError, match="the disk is gone"):
        test_fine_tuning(
            HEADS[NAMES[1]].model(), train_data=Breaking(), batch_size=4, effective_batch_size=8, n_epochs=1,
            validation_split=0.0, optimizer=lambda groups: ItemCounter(groups), progress=False, audit=False,
        )  # fmt: skip
    # Two windows were read before the first update was counted, and a third after it. Reading the fourth failed before
    # the third update, which still took place.
    assert len(taken) == 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_row_that_cannot_be_collated_is_named_with_and_without_workers(num_workers: int) -> None:
    rows = HEADS[NAMES[1]].rows(200)
    rows[180] = {**rows[180], "labels": "spam"}
    with pytest.raises(DataError, match=r"^In `train_data`, row 180 cannot be batched"):
        test_fine_tuning(
            HEADS[NAMES[1]].model(), train_data=rows, validation_split=0.0, num_workers=num_workers, progress=False
        )


OVER_WINDOW = {"loss_over": "window", "loss_inputs": lambda logits, _: logits}


@pytest.mark.parametrize(("k", "loss"), [(1, {}), (2, {}), (16, {}), (2, OVER_WINDOW), (16, OVER_WINDOW)])
def test_the_host_waits_once_per_update_whatever_the_number_of_passes(k: int, loss: dict[str, Any]) -> None:
    """This counts only ftaccum's own waits. A model may wait in its forward pass, but this one does not."""

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.EmbeddingBag(61, 8), nn.Linear(8, 3)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.embed(input_ids))

    syncs, windows = HostSyncs("cpu", except_under=("ftaccum/data/", "torch/optim/")), 0
    accumulate, update = GradientAccumulator.accumulate, TrainingLoop._update

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with syncs:
                return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientAccumulator, "accumulate", watched(accumulate))
        patch.setattr(TrainingLoop, "_update", watched(update))
        result = test_fine_tuning(
            Bag(), train_data=[{"input_ids": [n, n + 1], "labels": n % 3} for n in range(48)], batch_size=1,
            gradient_accumulation_steps=k, n_epochs=1, validation_split=0.0, progress=False,
            loss_fn=lambda logits, batch: nn.functional.cross_entropy(logits, batch["labels"]), **loss,
        )  # fmt: skip
        windows = len(result.loss_history)
    assert syncs.total == windows, syncs.where


def test_prefetched_windows_are_cut_again_with_what_was_learnt_since() -> None:
    """Processes prefetch unequally far. Different cuts of a window would lose some rows and repeat others."""

    class Loaded:
        def cut(self, rows: tuple[int, ...], planner: MicroBatchPlanner) -> list[list[MicroBatchRows]]:
            return planner.split(rows, [row + 1 for row in rows])

        def load(self, shares: Iterable[LocalRows], *, ahead: bool = False) -> Iterator[list[MicroBatch]]:
            taken = list(shares) if ahead else shares  # workers take all shares
            for share in taken:
                yield [MicroBatch(None, {}, (), piece, 0, 0) for piece in share.slices]

    dear, cheap = (
        MicroBatchPlanner(BatchLimits(4), CostModel(1000, 1, 0)),
        MicroBatchPlanner(BatchLimits(4), CostModel(0, 1, 0)),
    )
    window_loader = WindowLoader(Plan(24, 1, BatchSizes(4, 2, 1, 8)), cast(Loader, Loaded()), dear)
    local_windows = window_loader.epoch(0)
    assert len(next(local_windows).micro_batches) == 2
    local_windows.read_ahead()
    window_loader.planner = cheap
    for local_window in local_windows:
        assert len(local_window.micro_batches) == 8
        assert sorted(row for micro in local_window.micro_batches for row in micro.slice.rows) == sorted(
            local_window.window.rows
        )


@pytest.mark.slow
def test_a_masked_lm_is_cut_by_length_without_changing_its_draws() -> None:
    """Its collator draws once per window. Columns of nothing but padding in a micro-batch are cut off."""
    rows = [{"input_ids": row["input_ids"]} for row in HEADS["masked LM, BERT"].rows(40)]

    def mask(chosen: list[Row]) -> dict[str, Tensor]:
        batch = one_batch([{"input_ids": row["input_ids"]} for row in chosen])
        drawn = torch.rand(batch["input_ids"].shape) < 0.3
        labels = torch.where(drawn & batch["attention_mask"].bool(), batch["input_ids"], -100)
        return {**batch, "labels": labels}

    runs = []
    for arguments in ({"batch_size": 12}, {"batch_size": 3}, {"batch_size": 3, "num_workers": 2}):
        model = HEADS["masked LM, BERT"].model()
        with all_in_float64():
            result = test_fine_tuning(
                model, train_data=rows, data_collator=mask, effective_batch_size=12, n_epochs=1, progress=False,
                learning_rate=1e-3, **arguments,
            )  # fmt: skip
        runs.append((model.state_dict(), result))
    assert difference(runs[0], runs[1]) < 1e-9
    assert difference(runs[0], runs[2]) < 1e-9
    assert runs[1][1].padding_fraction < 0.6 * runs[0][1].padding_fraction


@pytest.mark.slow
def test_workers_leave_no_files_open() -> None:
    rows = HEADS[NAMES[1]].rows(300)
    most = []

    def watch(*_: Any) -> None:
        most.append(psutil.Process().num_fds())

    model = HEADS[NAMES[1]].model()
    model.register_forward_pre_hook(watch)
    before = psutil.Process().num_fds()
    test_fine_tuning(
        model, train_data=rows, batch_size=1, effective_batch_size=100, n_epochs=1, num_workers=2, progress=False,
        validation_split=0.0,
    )  # fmt: skip
    assert max(most) < before + 120


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_make_the_same_cuts_and_change_nothing(two_processes: Callable[..., str], tmp_path: Path) -> None:
    ways = {"planner off": WAYS["planner off"], "max_tokens": WAYS["max_tokens"], "workers": WAYS["workers"]}
    ways["max_tokens of 4 longest rows"] = WAYS["max_tokens of 4 longest rows"]
    # Costs change in the tenth window, after workers have cut it. With dummies, they change unequally often.
    ways["costs that change"] = {"n_epochs": 6, "num_workers": 2, "max_tokens": 26}
    (tmp_path / "ways.json").write_text(json.dumps({**ways, "padding-free": {"padding_free": True}}))
    runs = {name: (trained(name, 12, planner=False), trained(name, 12, n_epochs=6)) for name in (CAUSAL, NAMES[1])}
    torch.save(runs, tmp_path / "alone.pt")
    printed = two_processes("planner_of_two.py", str(tmp_path / "alone.pt"), str(tmp_path / "ways.json"))
    differences = json.loads(next(line for line in printed.splitlines() if line.startswith("DIFFERENCES "))[12:])
    assert len(differences) == 11
    assert max(differences.values()) < 1e-9, differences
