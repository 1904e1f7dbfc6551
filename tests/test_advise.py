"""`ftaccum advise`: what a run's noise scale says, and its branches at half, the same and twice the batch."""

import hashlib
import json
import math
import shutil
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, TrainerCallback

from ftaccum import Result, SettingsError
from ftaccum.apps.advise import branch
from ftaccum.apps.advise.branch import Branches, branch_recipe
from ftaccum.apps.advise.experiment import CELLS, Cell, RowOrder, experiment_of, scaled_rates, steady_rate
from ftaccum.apps.advise.noise import describe_advice
from ftaccum.apps.advise.recorded_run import RecordedRun
from ftaccum.apps.advise.statistics import (
    Outcome,
    as_json,
    differences_of,
    interval_of,
    intervals_of,
    table,
    verdict,
)
from ftaccum.apps.cli import main
from ftaccum.insight.noise_scale import NoiseEstimate
from ftaccum.planning.shuffle import order_of
from ftaccum.runtime.run_dir import RunDir
from ftaccum.training.run import run_training
from silent_errors.text_columns import TINY, word_tokenizer
from task_files import save_rows

pytestmark = pytest.mark.filterwarnings("ignore::ftaccum.TextWarning")

# Rows of 2 to 5 words that differ from each other, so that each can be recognized.
TEXTS = [f"row{n % 12} {('good', 'bad', 'film', 'very')[n // 12]}{' a' * (n % 4)}" for n in range(40)]
ROWS: list[dict[str, Any]] = [{"review": text, "stars": n % 3 > 0} for n, text in enumerate(TEXTS)]
RATE, SIZE, DONE = 0.05, 4, 13  # peak learning rate, rows of an update, updates before the checkpoint
STEADY = RATE * 7 / 13  # the mean of a linear schedule over 13 updates, which ends with RATE / 13


def train(folder: Path, *words: str) -> Path:
    """Train a tiny classifier in float64 with plain SGD, and return its output folder."""
    torch.manual_seed(0)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertModel(BertConfig(**{**TINY, **off})).double().save_pretrained(folder / "encoder")
    word_tokenizer().save_pretrained(folder / "encoder")
    given = ["--model", str(folder / "encoder"), "--train_data", save_rows(folder / "rows.jsonl", ROWS)]
    given += ["--columns", "label=stars", "--batch_size", "3", "--effective_batch_size", str(SIZE), "--n_epochs", "2"]
    given += ["--max_updates", str(DONE), "--optimizer", "sgd", "--weight_decay", "0", "--gradient_clip_norm", "none"]
    given += ["--learning_rate", str(RATE), "--validation_split", "0.1"]
    given += ["--verbosity", "quiet", "--output_dir", str(folder / "run"), *words]
    assert main(["train", *given]) == 0
    return Path(given[len(given) - given[::-1].index("--output_dir")])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of 36 rows an epoch that ended 16 rows into its second epoch."""
    return train(tmp_path_factory.mktemp("advised"))


@pytest.fixture(scope="module")
def branches(run: Path) -> Branches:
    recorded = RecordedRun.read(run, None)
    return Branches.load(recorded, recorded.experiment(0.7, 2), {"batch_size": 3, "verbosity": "quiet"})


class Trained(TrainerCallback):
    """One branch that was trained: its result, the weights that it began with, and the rows of its passes in order."""

    def __init__(self, branches: Branches, cell: Cell, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[tuple[int, ...]] = []
        self.before: dict[str, Tensor] = {}

        def keep_result(*given: Any) -> Result:
            self.result = run_training(*given)
            return self.result

        with monkeypatch.context() as patch:
            patch.setattr(branch, "run_training", keep_result)
            more = branches.loaded.more | {"callbacks": [self]}
            self.outcome = replace(branches, loaded=replace(branches.loaded, more=more)).train(cell, number)

    def __deepcopy__(self, _: Any) -> "Trained":
        return self

    def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, model: nn.Module, _: Any, given: dict[str, Any]) -> None:
        if model.training:
            masks = given["attention_mask"].bool()
            self.rows += [tuple(ids[mask].tolist()) for ids, mask in zip(given["input_ids"], masks, strict=True)]


@pytest.fixture(scope="module")
def trained(branches: Branches) -> dict[tuple[float, bool, int], Trained]:
    """Return a branch of each batch, and one with its rows in another order."""
    chosen = [(0.5, True, 0), (1.0, True, 0), (2.0, True, 0), (2.0, True, 1)]
    with pytest.MonkeyPatch.context() as patch:
        return {(r, s, n): Trained(branches, Cell(r, s), n, patch) for r, s, n in chosen}


def blocks(rows: list[Any], size: int) -> list[list[Any]]:
    """Return the rows in sorted blocks of a size, because the planner sorts within an update."""
    return [sorted(rows[n : n + size]) for n in range(0, len(rows), size)]


def test_branches_take_the_same_rows_in_updates_of_half_the_same_and_twice_the_size(trained: Any) -> None:
    half, same, twice = (trained[ratio, True, 0] for ratio in (0.5, 1.0, 2.0))
    assert [len(one.rows) for one in (half, same, twice)] == [32, 32, 32]
    assert blocks(half.rows, 8) == blocks(same.rows, 8) == blocks(twice.rows, 8)
    assert blocks(half.rows, 4) == blocks(same.rows, 4)
    assert [len(one.result.loss_history) - DONE for one in (half, same, twice)] == [16, 8, 4]


def test_branches_continue_with_the_rows_that_the_run_has_not_had(branches: Branches, trained: Any) -> None:
    tokenizer, texts = word_tokenizer(), branches.loaded.train["review"]
    left = sorted(tuple(tokenizer(texts[n])["input_ids"]) for n in order_of(1, 36, 42)[16:])
    assert sorted(trained[0.5, True, 0].rows[:20]) == left
    own, other = (trained[2.0, True, number].rows for number in (0, 1))
    assert set(own[:16]) | set(other[:16]) <= set(left) <= set(own[:24]) & set(other[:24])
    assert blocks(own, 8) != blocks(other, 8)


def test_branches_begin_with_the_weights_of_the_checkpoint(run: Path, trained: Any) -> None:
    (checkpoint,) = (run / "checkpoints").iterdir()
    saved = load_file(checkpoint / "model" / "model.safetensors")
    for one in trained.values():
        assert all(torch.equal(p, saved[name]) for name, p in one.before.items())


@pytest.mark.parametrize(("ratio", "factor"), [(0.5, 0.5), (1.0, 1.0), (2.0, 2.0)])
def test_a_branch_ends_with_the_loss_of_plain_sgd(
    ratio: float, factor: float, branches: Branches, trained: Any, run: Path
) -> None:
    one = trained[ratio, True, 0]
    labels = {tuple(word_tokenizer()(row["review"])["input_ids"]): int(row["stars"]) for row in ROWS}
    config = BertConfig.from_pretrained(run / "model")
    model = BertForSequenceClassification(config).double()
    model.load_state_dict(one.before, strict=False)

    def loss(rows: list[tuple[int, ...]]) -> Tensor:
        logits = torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows])
        return nn.functional.cross_entropy(logits, torch.tensor([labels[row] for row in rows]))

    optimizer, size = torch.optim.SGD(model.parameters(), lr=STEADY * factor), int(ratio * SIZE)
    for n in range(0, 32, size):
        optimizer.zero_grad()
        loss(one.rows[n : n + size]).backward()
        optimizer.step()
    assert branches.loaded.val is not None
    held = [tuple(word_tokenizer()(text)["input_ids"]) for text in branches.loaded.val["review"]]
    assert one.outcome.loss == pytest.approx(loss(held).item(), rel=1e-9)
    assert one.result.lr_history[DONE:] == pytest.approx([STEADY * factor] * (32 // size), rel=1e-12)


def test_rates_follow_the_batch_by_its_root_or_for_sgd_in_proportion(branches: Branches) -> None:
    of_sgd, of_adam = (
        experiment_of(16, 1000, name, rate=0.1, peak=0.2, share=0.5, seeds=3) for name in ("sgd", "adamw")
    )
    assert [of_sgd.rate_factor(cell) for cell in CELLS] == [0.5, 1, 1, 2, 1]
    assert [of_adam.rate_factor(cell) for cell in CELLS] == pytest.approx([0.5**0.5, 1, 1, 2**0.5, 1], rel=1e-15)
    assert of_adam.factor == 0.5
    adam = replace(branches.experiment, rule="sqrt")
    rates = [branch_recipe(branches.run, adam, cell)["learning_rate"] / STEADY for cell in CELLS]
    assert rates == pytest.approx([0.5**0.5, 1, 1, 2**0.5, 1], rel=1e-15)


def test_every_rate_of_a_recipe_is_scaled() -> None:
    groups = [{"pattern": "bias", "lr": 3.0, "weight_decay": 0.0}, {"pattern": "norm", "weight_decay": 0.1}]
    recipe = {"learning_rate": 1.0, "head_learning_rate": 2.0, "optimizer_groups": groups, "weight_decay": 0.5}
    scaled = [{"pattern": "bias", "lr": 6.0, "weight_decay": 0.0}, {"pattern": "norm", "weight_decay": 0.1}]
    assert scaled_rates(recipe, 2.0) == {"learning_rate": 2, "head_learning_rate": 4, "optimizer_groups": scaled}
    none = {"learning_rate": 1.0, "head_learning_rate": None, "optimizer_groups": None}
    assert scaled_rates(none, 1.0) == none


def test_a_schedule_that_has_decayed_gives_the_mean_rate() -> None:
    assert steady_rate([1.0, 0.6, 0.2]) == (0.2, True)
    rate, is_last = steady_rate([1.0, 0.5, 0.1])
    assert rate == pytest.approx(1.6 / 3)
    assert not is_last


@pytest.mark.parametrize(
    ("rates", "is_inside"), [([1.0, 2.0], True), ([2.0, 3.0], False), ([3.0, 2.0], False), ([3.0], False)]
)
def test_a_checkpoint_inside_the_warm_up_is_recognized(rates: list[float], is_inside: bool, branches: Branches) -> None:
    windows = [SimpleNamespace(learning_rate=rate) for rate in rates]
    checkpoint: Any = SimpleNamespace(windows=windows, metadata={"trained_on": {"learning_rate": [3.0, 9.0]}})
    assert replace(branches.run, checkpoint=checkpoint).is_warming_up is is_inside


def test_rows_that_the_run_has_trained_on_are_not_called_held_out(branches: Branches) -> None:
    first, second = (replace(branches, order=RowOrder(36, epoch, 0, 42, 16, n_held=8)) for epoch in (0, 1))
    assert (first.measure, first.has_seen_measured) == ("loss on held-out rows", False)
    assert (second.measure, second.has_seen_measured) == ("training loss on rows that no branch trains on", True)
    assert (branches.measure, branches.has_seen_measured) == ("validation loss", False)


def test_rows_are_whole_updates_of_all_sizes() -> None:
    for size, n_rows, share, even, rows in ((16, 5000, 0.05, 16, 224), (7, 1000, 0.1, 6, 96), (2, 80, 0.2, 2, 16)):
        found = experiment_of(size, n_rows, "adamw", rate=1.0, peak=1.0, share=share, seeds=2)
        assert (found.effective_batch_size, found.rows) == (even, rows)
        assert all(found.updates(cell) * found.size(cell) == rows for cell in CELLS)
    with pytest.raises(SettingsError, match=r"50 of the run's 1,000 rows, .* at least 128: 4 .* `--share 0.13`"):
        experiment_of(16, 1000, "adamw", rate=1.0, peak=1.0, share=0.05, seeds=2)
    with pytest.raises(SettingsError, match="The whole run has only 100 rows"):
        experiment_of(16, 100, "adamw", rate=1.0, peak=1.0, share=0.05, seeds=2)
    with pytest.raises(SettingsError, match="an update of this run has 1 row"):
        experiment_of(1, 1000, "adamw", rate=1.0, peak=1.0, share=0.05, seeds=2)


def test_another_order_moves_no_row_past_the_rows_that_are_done_or_held_out() -> None:
    order = RowOrder(n_rows=30, epoch=1, done=10, seed=7, rows=8, n_held=5)
    epoch = np.array(order_of(1, 30, 7))
    assert order.held() == epoch[18:23].tolist()
    assert order.arrangement(0) == list(range(30))
    seen = [np.array(order.arrangement(number))[epoch] for number in (1, 2)]
    for rows in seen:
        assert sorted(rows[:10]) == sorted(epoch[:10])
        assert rows[18:23].tolist() == epoch[18:23].tolist()
        assert sorted(rows[10:]) == sorted(epoch[10:])
        assert set(rows[10:18]) != set(epoch[10:18])
    assert seen[0].tolist() != seen[1].tolist()


def test_the_interval_of_a_mean_is_that_of_students_t() -> None:
    losses = [0.71, 0.69, 0.74, 0.70]
    low, high = stats.t.interval(0.9, 3, np.mean(losses), stats.sem(losses))
    found = interval_of(losses)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high), rel=1e-12)
    assert interval_of([1.0, 2.0, 3.0]).half_width == pytest.approx(2.919986 / 3**0.5, rel=1e-6)  # by a table
    assert not interval_of([1.0]).is_known
    assert str(interval_of([1.0, math.inf])) == "diverged"


def outcomes_of(means: list[float], spread: float = 0.001) -> list[Outcome]:
    """Return outcomes of all cells for three orders, which shift the losses of each batch differently."""
    shifts = {0.5: (-spread, 0.0, spread), 1.0: (0.0, spread, -spread), 2.0: (spread, -spread, 0.0)}
    pairs = list(zip(CELLS, means, strict=True))
    return [Outcome(cell, n + 1, mean + shifts[cell.ratio][n], 1.0) for n in range(3) for cell, mean in pairs]


def test_the_lowest_batch_is_named_only_if_its_interval_overlaps_no_other() -> None:
    given = experiment_of(16, 5000, "adamw", rate=1.0, peak=1.0, share=0.05, seeds=3)

    def said(means: list[float], spread: float = 0.001) -> str:
        return verdict(outcomes_of(means, spread), given, "validation loss", 60)

    assert said([0.8, 0.8, 0.7, 0.6, 0.8]).startswith("Twice the batch (32 rows) with the scaled learning rate")
    assert "`effective_batch_size=8`" in said([0.8, 0.5, 0.7, 0.6, 0.8])
    assert said([0.8, 0.8, 0.5, 0.6, 0.8]).startswith("The run's batch (16 rows) reached the lowest validation loss")
    assert said([0.8, 0.8, 0.5, 0.502, 0.8]).startswith(
        "No verdict: the 90% interval of updates of 16 rows overlaps those of 32 rows, and"
    )
    assert said([0.8, 0.5, 0.7, 0.6, 0.8]).endswith(
        "measured on 60 rows: the intervals cover the order of the training rows only, and not the choice of the 60 "
        "rows."
    )
    # 2.92 · 0.001 / √3 = 0.00169 is the half-width of each.
    assert said([0.8, 0.8, 0.5, 0.5035, 0.8]).startswith("The run's batch")
    assert said([0.8, 0.8, 0.7, 0.6, 0.6]).startswith("Twice the batch")  # two rates of one batch may overlap
    assert said([0.8, 0.8, 0.7, math.inf, 0.9]).startswith("The run's batch")
    assert said([math.inf] * 5).startswith("No verdict: all branches diverged")
    one = verdict(outcomes_of([0.5] * 5)[:5], given, "validation loss", 60)
    assert one.startswith("No verdict: the check has not trained")
    interrupted = intervals_of(outcomes_of([0.5] * 5)[:12])  # the third order has two of five branches
    assert [interval.mean for interval in interrupted.values()] == pytest.approx([0.4995, 0.4995, 0.5005, 0.5, 0.5])
    assert "× 2    32               7        1.41 scaled" in table(intervals_of(outcomes_of([0.5] * 5)), given, "loss")


def test_no_batch_is_named_if_every_longer_way_lowers_the_loss() -> None:
    of_adam, of_sgd = (
        experiment_of(2, 5000, name, rate=1.0, peak=1.0, share=0.05, seeds=3) for name in ("adamw", "sgd")
    )

    def said(means: list[float], given: Any = of_adam) -> str:
        return verdict(outcomes_of(means), given, "loss", 60)

    # Rate × updates, relative to the run's batch: 1.41, 2, 1, 0.71, 0.5; for SGD 1, 2, 1, 1, 0.5.
    learning = "No verdict: the run is still learning at this rate."
    assert said([0.6, 0.5, 0.7, 0.8, 0.9]).startswith(learning)
    assert said([0.8, 0.5, 0.7, 0.9, 0.95]).startswith("Half the batch (1 row) with the unchanged learning rate")
    assert said([0.6, 0.5, 0.7, 0.9, 0.8]).startswith("Half the batch")
    assert said([0.6, 0.5, 0.7, 0.8, math.inf]).startswith("Half the batch")
    assert said([0.7, 0.5, 0.6, 0.8, 0.9], of_sgd).startswith(learning)
    assert said([0.4, 0.5, 0.6, 0.8, 0.9], of_sgd).startswith("Half the batch (1 row) with the scaled")


def test_batches_are_compared_within_each_order_if_their_intervals_overlap() -> None:
    given = experiment_of(64, 50_000, "adamw", rate=1.0, peak=1.0, share=0.05, seeds=3)
    gaps = {0.5: (0.02, 0.021, 0.022), 1.0: (0.009, 0.010, 0.011), 2.0: (0.0, 0.0, 0.0)}  # in each order
    levels = (0.5, 0.6, 0.7)
    outcomes = [
        Outcome(c, n + 1, levels[n] + gaps[c.ratio][n] + (0 if c.scaled else 0.1), 1.0) for n in range(3) for c in CELLS
    ]
    found = differences_of(outcomes)
    assert list(found) == [Cell(0.5, True), Cell(1.0, True)]
    low, high = stats.t.interval(0.9, 2, 0.010, stats.sem(gaps[1.0]))
    assert found[Cell(1.0, True)].mean == pytest.approx(0.010, rel=1e-9)
    assert found[Cell(1.0, True)].half_width == pytest.approx((high - low) / 2, rel=1e-9)
    conclusion = verdict(outcomes, given, "validation loss", 60)
    assert conclusion.startswith(
        "The intervals overlap, because row orders differ more than batches. Order by order, the losses of updates of "
        "128 rows with the scaled learning rate were lower by 0.021 ± 0.0017 than those of 32 rows and 0.01 ± 0.0017 "
        "than those of 64 rows."
    )
    assert as_json(given, outcomes, "loss", 60, conclusion)["differences"][1]["mean"] == pytest.approx(0.010, rel=1e-9)
    assert differences_of([Outcome(cell, 1, math.inf, 1.0) for cell in CELLS]) == {}


@pytest.mark.parametrize(
    ("gap", "preferred", "none"),
    [(0.0, (0.0, 0.05), (0.95, 1.0)), (0.003, (0.35, 0.75), (0.25, 0.65)), (0.010, (0.8, 1.0), (0.0, 0.01))],
)
def test_simulated_checks_prefer_a_batch_that_is_better_and_seldom_one_that_is_not(
    gap: float, preferred: tuple[float, float], none: tuple[float, float]
) -> None:
    """Orders have the standard deviation 0.01, and branches of one order 0.001; twice the batch is lower by `gap`."""
    given, draw = experiment_of(64, 50_000, "adamw", rate=1.0, peak=1.0, share=0.05, seeds=3), np.random.RandomState(0)
    conclusions = []
    for _ in range(200):
        order, noise = draw.normal(0.5, 0.01, 3), draw.normal(0, 0.001, (3, len(CELLS)))
        losses = order[:, None] + noise - np.array([gap if cell == Cell(2.0, True) else 0.0 for cell in CELLS])
        outcomes = [Outcome(cell, n + 1, losses[n, m], 1.0) for n in range(3) for m, cell in enumerate(CELLS)]
        conclusions.append(verdict(outcomes, given, "loss", 60))
    shares = [np.mean([c.startswith(words) for c in conclusions]) for words in ("The intervals overlap", "No verdict")]
    assert preferred[0] <= shares[0] <= preferred[1]
    assert none[0] <= shares[1] <= none[1]
    assert gap == 0 or not any("updates of 64 rows" in c.split(" were lower")[0] for c in conclusions)


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let branches return losses without training, and print a line when the first one is trained."""
    found: dict[str, Any] = {"stops_at": None, "branches": []}

    def train_branch(_: Branches, cell: Cell, number: int) -> Outcome:
        if len(found["branches"]) == found["stops_at"]:
            raise KeyboardInterrupt
        if not found["branches"]:
            print("TRAINING")
        found["branches"].append((cell, number))
        return Outcome(cell, number + 1, 0.5 + abs(cell.ratio - 2) + 0.01 * number, 1.0)

    monkeypatch.setattr(Branches, "train", train_branch)
    return found


@pytest.mark.usefixtures("faked")
def test_relative_paths_start_in_the_folder_of_the_command(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((run / "run.json").read_text())
    assert record["directory"] == str(Path.cwd())
    shutil.copytree(run, tmp_path / "run")
    save_rows(tmp_path / "other.jsonl", ROWS[1:])
    (tmp_path / "other.jsonl").rename(tmp_path / "rows.jsonl")  # a file of the same name, which is another one
    monkeypatch.chdir(tmp_path)
    data = {"train_data": "rows.jsonl"}
    for directory, sources, status, said in (
        (str(run.parent), data | {"model": "encoder"}, 0, "Cost:"),
        ("", data, 2, "now has 35 training rows, but the run in 'run' trained on 36."),
        ("", data, 2, "start this command in the folder where the run was started."),
        (str(tmp_path / "gone"), data, 2, f"was started in the folder '{tmp_path / 'gone'}', which does not exist"),
    ):
        changed = record | {"directory": directory, "sources": record["sources"] | sources}
        (tmp_path / "run" / "run.json").write_text(json.dumps(changed))
        assert main(["advise", "run", "--check", "--share", "0.7", "--json", "found.json"]) == status
        assert said in "".join(capsys.readouterr())
        assert Path.cwd() == tmp_path
    assert (tmp_path / "found.json").is_file()


def test_another_number_of_processes_is_refused_before_the_cost_is_printed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ftaccum.runtime.accelerator.requested_processes", lambda: 2)
    assert main(["advise", str(run), "--check", "--share", "0.7"]) == 2
    printed = capsys.readouterr()
    assert "2 processes were requested, but this run would have 1" in printed.err
    assert not printed.out


@pytest.mark.usefixtures("faked")
def test_the_cost_is_printed_before_any_training(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    assert main(["advise", "--json", str(file), "--share", "0.7", "--check", str(run)]) == 0
    before, after = capsys.readouterr().out.split("TRAINING")
    assert "updates of 2, 4 and 8 rows, each over the same 32 rows (61.5% of the run's 52), in 3 orders" in before
    assert (
        "Learning rate: constant at 0.0269 (the mean over the run, because the schedule has decayed by then)" in before
    )
    assert "Cost: 15 branches, 480 rows (923% of the run), about 216 forward and backward passes" in before
    assert "Twice the batch (8 rows) with the scaled learning rate reached the lowest validation loss" in after
    found = json.loads(file.read_text())
    assert len(found["branches"]) == 15
    assert [cell["updates"] for cell in found["intervals"]] == [16, 16, 8, 4, 4]
    assert [cell["mean"] for cell in found["differences"]] == pytest.approx([1.5, 1.0])
    assert found["intervals"][0]["mean"] == pytest.approx(2.01)
    assert found["verdict"].startswith("Twice the batch")


def test_ctrl_c_keeps_the_branches_so_far(
    run: Path, faked: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faked["stops_at"], file = 7, tmp_path / "found.json"
    assert main(["advise", str(run), "--check", "--share", "0.7", "--json", str(file)]) == 130
    assert "No verdict: the check has not trained each branch with two orders" in capsys.readouterr().out
    assert len(json.loads(file.read_text())["branches"]) == 7


def test_bad_input_is_one_sentence_before_any_training(
    run: Path, faked: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def changed(sources: dict[str, Any], name: str) -> str:
        shutil.copytree(run, tmp_path / name)
        record = json.loads((run / "run.json").read_text())
        (tmp_path / name / "run.json").write_text(json.dumps(record | {"sources": sources}))
        return str(tmp_path / name)

    empty = tmp_path / "empty"
    shutil.copytree(run, empty, ignore=shutil.ignore_patterns("checkpoints"))
    diverged = Path(changed({"model": "x"}, "diverged"))
    shutil.rmtree(diverged / "checkpoints")
    result = json.loads((run / "result.json").read_text())
    result["loss_history"][-1] = None
    (diverged / "result.json").write_text(json.dumps(result))
    for folder, words, sentence in (
        (str(tmp_path / "none"), [], "There is no folder"),
        (str(tmp_path), [], "is not the output folder of a run"),
        (changed({}, "python"), [], "was started from Python"),
        (changed({"streaming": True}, "stream"), [], "reads a stream"),
        (str(empty), [], "has no sound checkpoint to continue from. They were removed, are damaged, or none was saved"),
        (str(diverged), [], "continue from. The loss of its last update was not finite"),
        (str(run), ["--checkpoint", "update-1"], "there is no such folder. The run has: update-00000013"),
        (str(run), [], "`share` is 0.05, which is 2 of the run's 52 rows"),
        (str(run), ["--seeds", "1"], "`seeds` must be an integer of 2 or more"),
        (str(run), ["--share", "1.5"], "`share` must be a number above 0, up to 1"),
        (str(run), ["--json", str(tmp_path / "none" / "x.json")], "is in a folder that does not exist"),
    ):
        assert main(["advise", folder, "--check", *words]) == 2
        printed = capsys.readouterr()
        assert sentence in printed.err
        assert printed.err.count("\n") == 1
        assert not printed.out
    with RunDir(run).lock():
        assert main(["advise", str(run), "--check", "--share", "0.7"]) == 2
    assert "is training at the moment" in capsys.readouterr().err
    assert main(["advise", str(run), "--share", "0.7"]) == 2
    assert "`--share` belongs to the check" in capsys.readouterr().err
    for words, sentence in (
        ([], "RUN is required: the output folder of a run"),
        (["--check", "yes"], "RUN is required"),
        ([str(run), "--check", "elsewhere"], f"takes one RUN, but 2 were given: {str(run)!r}, 'elsewhere'"),
        (["--chek", str(run)], "There is no option '--chek'. Did you mean '--check'?"),
    ):
        assert main(["advise", *words]) == 2
        assert sentence in capsys.readouterr().err
    assert faked["branches"] == []


def test_changed_rows_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    for rows, sentence in ((ROWS[1:], "which now has 35 training rows"), (ROWS[::-1], "`train_data` was")):
        file = save_rows(tmp_path / "rows.jsonl", rows)
        (tmp_path / "run" / "run.json").write_text(
            json.dumps(record | {"sources": record["sources"] | {"train_data": file}})
        )
        assert main(["advise", str(tmp_path / "run"), "--check", "--share", "0.7"]) == 2
        assert sentence in capsys.readouterr().err


def test_an_estimate_is_described_with_its_interval() -> None:
    noise = {"rows": 64, "measured_updates": 20, "signal_share": 0.25}
    noise |= {"signal_share_lower": 0.2, "signal_share_upper": 0.32, "training_rows": 6000, "noise_rows_of_data": 186.0}
    noise |= {"noise_rows": 192.0, "noise_rows_lower": 136.0, "noise_rows_upper": 256.0}
    noise |= {"noise_tokens": 1920.0, "noise_tokens_lower": 1360.0, "noise_tokens_upper": 2560.0}
    said = "\n".join(describe_advice(noise))
    assert "190 rows (90% interval: 140 to 260); 1,900 tokens (90% interval: 1,400 to 2,600)" in said
    assert "Against the run's own 6,000 training rows: 190 rows\n" in said
    assert "25% of the squared gradient of an update of 64 rows (90% interval: 20% to 32%)" in said
    assert "1.60 times as useful (90% interval: 1.52 to 1.67)" in said
    assert "up to about 190 rows" in said
    assert "64 rows are below that" in said
    assert "200 rows are within the interval" in "\n".join(describe_advice(noise | {"rows": 200}))
    assert "300 rows are above that" in "\n".join(describe_advice(noise | {"rows": 300}))
    noise |= {"signal_share_lower": 0.0, "noise_rows": math.nan, "noise_rows_of_data": math.nan}
    assert "It may reach past this run's 300 rows" in "\n".join(describe_advice(noise | {"rows": 300}))
    assert "at least 140 rows; at least 1,400 tokens" in "\n".join(describe_advice(noise))
    said = "\n".join(describe_advice(noise | {"noise_rows_upper": math.inf, "noise_tokens_lower": math.nan}))
    assert "Noise scale: at least 140 rows\nSignal" in said
    assert "at most 32% of the squared gradient" in said
    assert "1.52 times as useful or more" in said


def test_a_run_without_a_noise_scale_says_why(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "run")
    result = json.loads((run / "result.json").read_text())
    record = json.loads((run / "run.json").read_text())
    unknown = dict.fromkeys(f.name for f in fields(NoiseEstimate)) | {"rows": 64, "measured_updates": 3}
    for values, reason, sentence in (
        ({}, record["noise_scale_reason"], "not measured, because an update has 4 rows, fewer than 16. Give a larger"),
        ({}, "the model is sharded", "Noise scale: not measured, because the model is sharded."),
        ({}, "", "Noise scale: not measured. An older version trained the run"),
        ({"interrupted": True}, "", "Noise scale: not measured yet. Continue the run"),
        ({"noise_scale": unknown}, "", "Noise scale: not known yet"),
    ):
        (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"noise_scale_reason": reason}))
        (tmp_path / "run" / "result.json").write_text(json.dumps(result | values))
        assert main(["advise", str(tmp_path / "run")]) == 0
        said = capsys.readouterr().out
        assert sentence in said
        assert f"`ftaccum advise {tmp_path / 'run'} --check` compares" in said
    for folder in (tmp_path / "none", tmp_path):
        assert main(["advise", str(folder)]) == 2
    assert "There is no folder" in capsys.readouterr().err


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "share", "measure"),
    [
        ((), "0.7", "validation loss"),
        (("--lora", "--optimizer", "adamw", "--max_updates", "18"), "0.5", "validation loss"),
        (("--validation_split", "0", "--max_updates", "10"), "0.8", "training loss on rows that no branch trains on"),
        (("--sampler", "balanced", "--lr_scheduler", "cosine"), "0.7", "validation loss"),
    ],
)
def test_a_check_changes_nothing_in_the_folder_of_the_run(
    words: tuple[str, ...], share: str, measure: str, tmp_path: Path
) -> None:
    run, file = train(tmp_path, *words), tmp_path / "found.json"
    before = contents(run)
    options = ["--share", share, "--seeds", "2", "--json", str(file), "--verbosity", "quiet"]
    assert main(["advise", str(run), "--check", *options]) == 0
    assert contents(run) == before
    found = json.loads(file.read_text())
    assert found["measure"] == measure
    losses = [one["loss"] for one in found["branches"]]
    assert len(set(losses)) == 10
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.slow
def test_a_branch_of_the_same_batch_is_the_run_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        "--optimizer",
        "adamw",
        "--lr_scheduler",
        "constant",
        "--learning_rate",
        "1e-3",
        "--gradient_clip_norm",
        "1",
        "--n_epochs",
        "3",
    )
    run = train(tmp_path, *words)
    longer = train(tmp_path, *words, "--max_updates", str(DONE + 8), "--output_dir", str(tmp_path / "longer"))
    recorded = RecordedRun.read(run, None)
    branches = Branches.load(recorded, recorded.experiment(0.7, 2), {"batch_size": 3, "verbosity": "quiet"})
    found = Trained(branches, Cell(1.0, scaled=True), 0, monkeypatch).result
    assert found.loss_history == pytest.approx(Result.load(longer).loss_history, rel=1e-12)
    assert found.final_loss == pytest.approx(Result.load(longer).final_loss, rel=1e-12)


@pytest.mark.slow
def test_a_run_without_validation_rows_needs_rows_to_hold_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path, "--validation_split", "0")
    assert main(["advise", str(run), "--check", "--share", "0.7"]) == 2
    assert "only 0 rows of its epoch follow the 32" in capsys.readouterr().err
