"""`ftaccum advise`: what a run's noise scale says, and its branches at half, the same and twice the batch."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, TrainerCallback

from ftaccum import SettingsError
from ftaccum.apps.advise import branch, check
from ftaccum.apps.advise.branch import Branches, branch_recipe, runtime_of
from ftaccum.apps.advise.experiment import CELLS, Cell, RowOrder, experiment_of, scaled_rates, steady_rate
from ftaccum.apps.advise.figures import Interval, Outcome, interval_of, intervals_of, table, verdict
from ftaccum.apps.advise.noise import describe_scale
from ftaccum.apps.advise.recorded_run import RecordedRun
from ftaccum.apps.cli import main
from ftaccum.planning.shuffle import order_of
from silent_errors.text_columns import TINY, word_tokenizer
from task_files import save_rows

pytestmark = pytest.mark.filterwarnings("ignore::ftaccum.TextWarning")

# Rows of 2 to 5 words that differ from each other, so that each can be recognised.
TEXTS = [f"row{n % 12} {('good', 'bad', 'film', 'very')[n // 12]}{' a' * (n % 4)}" for n in range(40)]
ROWS = [{"review": text, "stars": n % 3 > 0} for n, text in enumerate(TEXTS)]
RATE, SIZE, DONE = 0.05, 4, 13  # learning rate, rows of an update, updates before the checkpoint


def train(folder: Path, *words: str) -> Path:
    """Train a tiny classifier in float64 with plain SGD, and return its output folder."""
    torch.manual_seed(0)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertModel(BertConfig(**{**TINY, **off})).double().save_pretrained(folder / "encoder")
    word_tokenizer().save_pretrained(folder / "encoder")
    given = ["--model", str(folder / "encoder"), "--train_data", save_rows(folder / "rows.jsonl", ROWS)]
    given += ["--columns", "label=stars", "--batch_size", "3", "--effective_batch_size", str(SIZE), "--n_epochs", "2"]
    given += ["--max_updates", str(DONE), "--optimizer", "sgd", "--weight_decay", "0", "--gradient_clip_norm", "none"]
    given += ["--learning_rate", str(RATE), "--lr_scheduler", "constant", "--validation_split", "0.1"]
    assert main(["train", *given, "--verbosity", "quiet", "--output_dir", str(folder / "run"), *words]) == 0
    return folder / "run"


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
        original = branch.run_training

        def run_training(*given: Any) -> Any:
            self.result = original(*given)
            return self.result

        with monkeypatch.context() as patch:
            patch.setattr(branch, "run_training", run_training)
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


def test_branches_continue_with_the_rows_that_the_run_has_not_had(branches: Branches, trained: Any, run: Path) -> None:
    tokenizer, texts = word_tokenizer(), branches.loaded.train["review"]
    left = order_of(1, 36, 42)[16:]
    wanted = sorted(tuple(tokenizer(texts[n])["input_ids"]) for n in left)
    for number in (0, 1):
        assert sorted(trained[2.0, True, number].rows[: len(left) // 8 * 8]) != wanted
        assert set(trained[2.0, True, number].rows[:16]) <= set(wanted)
        assert sorted(trained[0.5, True, 0].rows[: len(left)]) == wanted
    assert blocks(trained[2.0, True, 1].rows, 8) != blocks(trained[2.0, True, 0].rows, 8)


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

    optimizer, size = torch.optim.SGD(model.parameters(), lr=RATE * factor), int(ratio * SIZE)
    for n in range(0, 32, size):
        optimizer.zero_grad()
        loss(one.rows[n : n + size]).backward()
        optimizer.step()
    held = [tuple(word_tokenizer()(text)["input_ids"]) for text in branches.loaded.val["review"]]
    assert one.outcome.loss == pytest.approx(loss(held).item(), rel=1e-9)
    assert one.result.lr_history[DONE:] == pytest.approx([RATE * factor] * (32 // size), rel=1e-12)
