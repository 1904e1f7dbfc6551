"""Validation of a loss over the window: in groups of the effective batch size, whatever the batches."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.distributions import IntDistribution
from torch import Tensor
from transformers import EvalPrediction

from ftaccum import DataError, DivergedError, Result, SettingsError, search
from ftaccum.apps.run_arguments import default_arguments
from ftaccum.apps.search.validation import define_search
from ftaccum.data.loader import LocalRows
from ftaccum.objective.item_counts import Batch
from ftaccum.objective.window_terms import CollectedValues, ComputedTerms, Values, WindowPart, WindowTerms
from ftaccum.planning.micro_batches import MicroBatchRows
from ftaccum.runtime.process_group import ProcessGroup
from ftaccum.training.base_run import Run
from ftaccum.training.build_evaluation import build_evaluation
from ftaccum.training.config import RunConfig
from ftaccum.training.evaluate_rows import evaluate_rows
from ftaccum.training.evaluation_groups import EvaluationGroups
from windowed import (
    GROUP,
    ROWS,
    VAL_ROWS,
    Breaking,
    BreaksRow9,
    Embedder,
    drawing,
    ordered,
    reference,
    rows_of,
    trained,
)


def near(value: float) -> Any:
    return pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(("batch_size", "eval_batch_size"), [(1, None), (4, 1), (2, 3), (3, 64)])
def test_the_validation_loss_is_the_mean_of_groups_weighted_by_rows(batch_size: int, eval_batch_size: int) -> None:
    found = trained(batch_size=batch_size, eval_batch_size=eval_batch_size)
    assert found.initial_loss == near(reference())


def test_few_validation_rows_are_one_group(capsys: pytest.CaptureFixture[str]) -> None:
    found = trained(val_data=VAL_ROWS[:3])
    assert found.initial_loss == near(reference(rows=VAL_ROWS[:3], group=3))
    assert "Validation loss: the 3 validation rows are one group, smaller than an update" in capsys.readouterr().out


def test_the_banner_tells_the_groups(capsys: pytest.CaptureFixture[str]) -> None:
    trained()
    told = capsys.readouterr().out
    assert "Validation loss: on groups of 4 rows, weighted by their rows; the last group has 3" in told
    assert "Note: some updates have fewer than 4 rows, which changes their loss" in told
    trained(train_data=ROWS[:8], val_data=VAL_ROWS[:4])
    told = capsys.readouterr().out
    assert "Validation loss: on groups of 4 rows, weighted by their rows\n" in told
    assert "some updates have fewer" not in told


def test_groups_stay_when_updates_grow() -> None:
    found = trained(batch_size=4, effective_batch_size=None, gradient_accumulation_steps=[(0, 1), (1, 2)],
                    learning_rate=1e-15)  # fmt: skip
    assert found.val_loss_history == [near(reference())]


def test_a_resumed_run_with_larger_updates_keeps_its_groups(tmp_path: Path) -> None:
    common = {"output_dir": str(tmp_path), "learning_rate": 1e-15, "n_epochs": 3}
    trained(**common, max_updates=1)
    changed = ["max_updates", "effective_batch_size"]
    for n, size in ((2, 8), (3, 10)):
        found = trained(**common, resume="auto", effective_batch_size=size, max_updates=n, allow_changed=changed)
        assert found.val_loss_history[-1] == near(reference())


def test_a_batch_that_does_not_fit_is_halved_and_its_rows_keep_their_places() -> None:
    model = Embedder()
    model.most = 1
    found = trained(model, batch_size=4)
    assert model.has_trained
    assert found.val_loss_history == [near(value) for value in trained(batch_size=4).val_loss_history]


def test_halves_and_single_rows_of_a_micro_batch_keep_their_places() -> None:
    with Run(configured()) as run:
        loader = run.data.train
        piece = MicroBatchRows.of((5, 6, 7, 8), (3, 0, 2))
        micro = next(loader.stream([LocalRows((5, 6, 7, 8), [piece], (0,))]))
        assert [half.slice for half in loader.halves(micro)] == [
            MicroBatchRows((8,), places=(3,)),
            MicroBatchRows((5, 7), places=(0, 2)),
        ]
        assert loader.row_of(micro, 2).slice == MicroBatchRows((7,), places=(2,))


def test_metrics_get_all_predictions_in_the_order_of_the_rows() -> None:
    got: list[EvalPrediction] = []
    trained(compute_metrics=lambda p: got.append(p) or {"rows": len(p.predictions)})
    model = Embedder()
    ids = [torch.tensor([row["input_ids"]]) for row in VAL_ROWS]
    embedded = torch.cat([model(one, torch.ones_like(one)) for one in ids])
    assert torch.allclose(torch.from_numpy(got[0].predictions), embedded, rtol=1e-12)


def test_random_draws_of_a_loss_depend_on_nothing_but_the_group() -> None:
    runs = [
        trained(Embedder(dropout=0.5), loss_fn=drawing, batch_size=size, learning_rate=1e-15, evaluate_every=every)
        for size, every in ((1, None), (4, None), (4, 1))
    ]
    assert {round(run.initial_loss, 12) for run in runs} == {round(runs[0].initial_loss, 12)}
    assert runs[2].val_loss_history == [near(runs[0].initial_loss)] * 3
    assert runs[2].loss_history == runs[1].loss_history  # further evaluations draw nothing of the run's numbers


def test_a_row_that_cannot_be_read_ends_the_evaluation_with_its_name() -> None:
    rows = Breaking()
    with pytest.raises(DataError, match="Row 9 of `val_data`"):
        trained(val_data=rows, callbacks=[BreaksRow9(rows)])


@dataclass(frozen=True)
class Computed(ComputedTerms):
    means: dict[str, Tensor]

    def part(self, *_: Any) -> WindowPart:
        raise AssertionError("an evaluation has no second pass")

    def zero(self, *_: Any) -> Tensor:
        raise AssertionError("an evaluation has no dummies")


class Pairwise(WindowTerms):
    """The term "pairs" of a loss, over all rows of a group."""

    names = ("pairs",)

    def read(self, outputs: Tensor, _: Batch) -> Values:
        return {"embeddings": outputs}

    def compute(self, passes: Sequence[CollectedValues], _: ProcessGroup, __: Sequence[int]) -> Computed:
        places = torch.tensor([place for each in passes for place in each.places])
        embedded = torch.cat([each.values["embeddings"] for each in passes])[places.argsort()]
        return Computed({"pairs": ordered(embedded, {"labels": torch.tensor([0.0, 2.0])})})


def two_terms(embeddings_BD: Tensor, batch: Any) -> dict[str, Tensor]:
    return {"mean": (embeddings_BD.sum(-1) - batch["labels"]).square().mean(), "pairs": embeddings_BD.sum(-1).mean()}


def configured(**arguments: Any) -> RunConfig:
    given = {
        "model": Embedder(),
        "train_data": VAL_ROWS,
        "loss_fn": two_terms,
        "batch_size": 3,
        "validation_split": 0.0,
    }
    return RunConfig.from_arguments(default_arguments() | given | {"verbosity": "quiet"} | arguments)


def test_terms_over_the_window_are_evaluated_beside_means_over_rows() -> None:
    with Run(configured()) as run:
        run.data.objective.window = Pairwise()
        loss, _ = build_evaluation(run, run.data.train, EvaluationGroups(11, GROUP))(run.model)
    pairs = reference(lambda embedded, _: ordered(embedded, {"labels": torch.tensor([0.0, 2.0])}))
    assert loss == near(pairs + reference(lambda *given: two_terms(*given)["mean"]))


@pytest.mark.parametrize(("size", "group"), [(GROUP, GROUP), (None, 64)])
def test_rows_are_evaluated_without_training_in_groups_of_the_run(size: int | None, group: int) -> None:
    found = evaluate_rows(configured(loss_fn=ordered, loss_over="window", effective_batch_size=size))
    assert (found.n_rows, found.loss) == (11, near(reference(group=group)))


def test_what_a_loss_reads_of_a_batch_does_not_keep_its_outputs_in_memory() -> None:
    outputs = torch.randn(5, 7, 3)
    kept = CollectedValues.of((), {"first": outputs[:, 0], "whole": outputs}).values
    assert kept["first"].untyped_storage().nbytes() == 5 * 3 * 4
    assert torch.equal(kept["first"], outputs[:, 0])
    assert kept["whole"].data_ptr() == outputs.data_ptr()


def test_a_result_lists_the_updates_with_fewer_rows(tmp_path: Path) -> None:
    found = trained(n_epochs=2, output_dir=str(tmp_path))
    assert found.short_updates == [3, 6]
    assert Result.load(tmp_path).short_updates == [3, 6]
    rows = [
        json.loads(line)["rows"] for line in (tmp_path / "ledger.jsonl").read_text().splitlines() if "window" in line
    ]
    assert rows == [4, 4, 2] * 2


def searched(**arguments: Any) -> Any:
    given = {"train_data": ROWS, "val_data": VAL_ROWS, "loss_fn": ordered, "loss_over": "window", "batch_size": 4}
    return search(Embedder, **(given | arguments))


@pytest.mark.parametrize("steps", [(1, 2), (8,), IntDistribution(1, 4)])
def test_a_search_does_not_compare_losses_over_windows_of_different_sizes(steps: Any) -> None:
    with pytest.raises(SettingsError, match="a validation loss depends on the effective batch size") as caught:
        searched(accumulation_steps=steps)
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"accumulation_steps": (1,)},
        {"accumulation_steps": (1, 2), "compute_metrics": lambda _: {"mrr": 1.0}, "metric_for_best": "mrr"},
        {"accumulation_steps": (1, 2), "loss_over": "items"},
    ],
)
def test_a_search_takes_windows_of_one_size_or_a_metric(arguments: dict[str, Any]) -> None:
    own = {"accumulation_steps": arguments.pop("accumulation_steps"), "learning_rate": 1e-3, "space": None}
    given = {"train_data": ROWS, "val_data": VAL_ROWS, "loss_fn": ordered, "loss_over": "window", "batch_size": 4}
    found = define_search(Embedder, given | arguments, {}, **own, output_dir=None, progress=False)
    assert found.space.candidates() == list(own["accumulation_steps"])


BAD = 13  # a row that no check before training examines


class Marked(Embedder):
    """An embedder whose output is NaN for rows that begin with token 19."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embedded = super().forward(input_ids, attention_mask)
        return torch.where((input_ids[:, :1] == 19), math.nan, embedded)


def spread(embeddings_BD: Tensor, batch: Any) -> Tensor:
    """Return a loss that is NaN for one row alone, and for rows with the target 7."""
    scale = torch.where((batch["labels"] == 7).any(), math.nan, 1.0)
    return embeddings_BD.var(0).mean() * batch["labels"].double().var() * scale


def diverged(**changed: Any) -> DivergedError:
    rows = [{**row, "input_ids": [min(token, 18) for token in row["input_ids"]]} for row in rows_of(24, seed=4)]
    rows[BAD] = rows[BAD] | changed
    with pytest.raises(DivergedError) as caught:
        trained(Marked(), train_data=rows, val_data=None, validation_split=0.0, loss_fn=spread, on_nonfinite="error")
    return caught.value


@pytest.mark.parametrize(
    "changed", [{"input_ids": [19, 1], "attention_mask": [1, 1]}, {"labels": math.nan}, {"labels": math.inf}]
)
def test_a_row_of_which_the_loss_reads_a_number_that_is_not_finite_is_named(changed: dict[str, Any]) -> None:
    error = diverged(**changed)
    assert error.rows == (f"row {BAD} of `train_data`",)
    value = changed.get("labels", math.nan)
    assert (
        f"Rows with a number among the inputs of the loss that is not finite: row {BAD} of `train_data` ({value})"
        in str(error)
    )


def test_no_row_is_named_if_the_loss_itself_makes_nan() -> None:
    error = diverged(labels=7.0)
    assert error.rows == ()
    assert "its loss is nan, although all that it reads is finite. The fault is in `loss_fn`." in str(error)


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_evaluate_the_same_groups(two_processes: Callable[..., str]) -> None:
    printed = two_processes("window_evaluation_of_two.py")
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("FOUND "))[6:])
    assert found["losses"] == [near(reference())] * 2
    assert found["one row"] == [near(reference(rows=VAL_ROWS[:9]))] * 2
    assert found["draws"] == [near(trained(loss_fn=drawing).initial_loss)] * 2
    (unreadable,) = set(found["unreadable"])
    assert "Row 9 of `val_data`" in unreadable
    assert "so all processes stop" in unreadable
