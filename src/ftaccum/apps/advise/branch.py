"""Train one branch of a check: the run continued from its checkpoint with updates of another size."""

import math
import time
from dataclasses import dataclass, fields, replace
from typing import Any

from datasets import Dataset

from ...errors import CheckpointError, CheckpointMismatchError, DivergedError, SettingsError
from ...planning.shuffle import hold_out
from ...runtime.sharding.launcher import hidden_modes
from ...runtime.state_guards import preserve_rng
from ...settings.recipe import CHANGEABLE
from ...settings.runtime import Runtime
from ...tasks.load import Loaded, load, loading
from ...tracking.console import Console
from ...training.callbacks import Callback
from ...training.config import RunConfig
from ...training.run import run_training
from ..run_arguments import default_arguments
from .experiment import Cell, Experiment, RowOrder, scaled_rates
from .recorded_run import RecordedRun
from .statistics import Outcome

# Metrics do not enter the comparison, and generating texts for them may take longer than the training.
_OF_METRICS = ("compute_metrics", "preprocess_logits_for_metrics", "generation_kwargs")
_ENDS = {  # settings that would end a branch early, or choose its weights
    "evaluate_every": None,
    "metric_for_best": None,
    "greater_is_better": None,
    "early_stopping_patience": None,
    "early_stopping_min_delta": 0.0,
    "restore_best_weights": False,
}
_CONSTANT_RATE = {
    "lr_scheduler": "constant",
    "lr_scheduler_kwargs": None,
    "warmup_steps": 0,
    "warmup_ratio": 0.0,
    "learning_rate_scaling": "none",
}


class _Silent(Callback):
    """A callback that lets a branch print and save nothing."""

    logs = False
    saves_model = False

    def console(self, is_main: bool, progress: bool) -> Console:  # noqa: ARG002
        return Console(is_main=False, progress=False)


@dataclass(frozen=True)
class Branches:
    """The branches of a check, ready to be trained.

    Attributes:
        run: the run.
        experiment: what its branches compare.
        runtime: settings of the Runtime by name.
        loaded: the rows, and how to load a new model.
        order: the rows that follow the checkpoint.
    """

    run: RecordedRun
    experiment: Experiment
    runtime: dict[str, Any]
    loaded: Loaded
    order: RowOrder

    @classmethod
    def load(cls, run: RecordedRun, experiment: Experiment, runtime: dict[str, Any]) -> "Branches":
        """Load the rows and the model as the run did.

        Args:
            runtime: settings of the Runtime by name, in place of those that the run's folder records.

        Raises:
            SettingsError: if the rows are no longer those of the run, or too few follow the checkpoint.
            DataError: if the rows cannot be read.
        """
        settings = runtime_of(run) | runtime
        recipe = run.recipe | {"lora": run.record.sources.get("lora")}
        with loading(verbosity="quiet", progress=False):
            loaded = replace(load(run.named, recipe | settings), model=None)  # each branch loads its own
        loaded = _split(loaded, run.recipe)
        if len(loaded.train) != run.n_rows:
            raise SettingsError(
                [
                    f"`train_data` is {run.named.train_data!r}, which now has {len(loaded.train):,} training rows, but "
                    f"the run in {str(run.folder)!r} trained on {run.n_rows:,}. `--check` needs the same rows."
                ]
            )
        return cls(run, experiment, settings, loaded, _order(run, experiment, loaded))

    @property
    def measure(self) -> str:
        """The loss by which branches are compared."""
        if self.has_seen_measured:
            return "training loss on rows that no branch trains on"
        return "loss on held-out rows" if self.order.n_held else "validation loss"

    @property
    def has_seen_measured(self) -> bool:
        """Whether the run has trained on the rows that it is measured on: without validation rows, from epoch 2 on."""
        return bool(self.order.n_held and self.order.epoch)

    @property
    def n_measured(self) -> int:
        """Number of rows that it is measured on."""
        return self.order.n_held or len(self.loaded.val or ())

    def train(self, cell: Cell, number: int) -> Outcome:
        """Train one branch, and return its loss; an infinite one if it diverges.

        Args:
            number: number of the order of its rows, from 0.

        Raises:
            SettingsError: if the model or the rows are no longer those of the checkpoint's run.
        """
        started = time.perf_counter()
        with preserve_rng(), hidden_modes():
            model = self.loaded.new_model()
        try:
            config = RunConfig.from_arguments(self._arguments(cell, number) | {"model": model})
            loss = run_training(config, _Silent()).final_loss
        except DivergedError:
            loss = math.inf
        except CheckpointError as error:
            raise SettingsError(
                [
                    f"The run in {str(self.run.folder)!r} cannot be continued: its model, its data or its settings "
                    "have changed since its checkpoint.",
                    *(error.differences if isinstance(error, CheckpointMismatchError) else error.faults),
                ]
            ) from error
        return Outcome(cell, number + 1, loss if math.isfinite(loss) else math.inf, time.perf_counter() - started)

    def _arguments(self, cell: Cell, number: int) -> dict[str, Any]:
        """Return all arguments of a branch's run except the model."""
        recipe = branch_recipe(self.run, self.experiment, cell)
        was = self.run.recipe
        changed = {name for name, value in recipe.items() if name in was and value != was[name]}
        rows: dict[str, Any] = {"train_data": self._train_rows(number), "val_data": self._val_rows()}
        changed |= {"learning_rate", "effective_batch_size"} | ({"train_data"} if number else set())
        changed |= {"val_data"} if self.order.n_held else set()
        given = {name: value for name, value in self.loaded.arguments().items() if name not in _OF_METRICS}
        resume = {"resume": str(self.run.checkpoint.path), "allow_changed": [n for n in CHANGEABLE if n in changed]}
        lora = {"lora": self.run.record.sources.get("lora")}
        return default_arguments() | given | rows | recipe | self.runtime | resume | lora

    def _train_rows(self, number: int) -> Dataset:
        return self.loaded.train.select(self.order.arrangement(number)) if number else self.loaded.train

    def _val_rows(self) -> Dataset | None:
        return self.loaded.train.select(self.order.held()) if self.order.n_held else self.loaded.val


def branch_recipe(run: RecordedRun, experiment: Experiment, cell: Cell) -> dict[str, Any]:
    """Return the Recipe of a branch, by setting: the run's, with its own size of updates, rates and end.

    Rows are carried into the next epoch, so that all updates are full.
    """
    end = run.rows_done + experiment.rows
    return {
        **run.recipe,
        **_ENDS,
        **_CONSTANT_RATE,
        **scaled_rates(run.recipe, experiment.factor * experiment.rate_factor(cell)),
        "effective_batch_size": experiment.size(cell),
        "remainder": "carry",
        "max_updates": run.n_updates + experiment.updates(cell),
        "n_epochs": max(run.recipe["n_epochs"], -(-end // run.n_rows)),
    }


def runtime_of(run: RecordedRun) -> dict[str, Any]:
    """Return the settings of the Runtime that branches have if the user gives no others, by name.

    Those that matter to rounding are the run's, among them most that decide how much memory a pass takes. The launcher
    decides whether the model is sharded.
    """
    known = {f.name for f in fields(Runtime)} - {"sharding", "sync"}
    recorded = {name: value for name, value in run.run_with.items() if name in known}
    if not recorded.get("planner", True):
        recorded["planner_costs"] = None  # the planner is off where the loss compares rows, too
    return recorded | {
        "audit": False,
        "noise_scale": False,
        "on_inexact": "ignore",
        "checkpoint_every": None,
        "keep_checkpoints": 0,
        "progress": False,
    }


def _split(loaded: Loaded, recipe: dict[str, Any]) -> Loaded:
    """Return the rows with the validation rows that the run held out, so that no other order of rows moves them."""
    if loaded.val is not None or not recipe["validation_split"]:
        return loaded
    kept, held = hold_out(len(loaded.train), recipe["validation_split"], recipe["random_seed"])
    return replace(loaded, train=loaded.train.select(kept), val=loaded.train.select(held))


def _order(run: RecordedRun, experiment: Experiment, loaded: Loaded) -> RowOrder:
    """Return the rows that follow the checkpoint, some of them held out if the run has no validation rows."""
    seed, rows = run.recipe["random_seed"], experiment.rows
    epoch, done = divmod(run.rows_done, run.n_rows)
    is_balanced = run.recipe.get("sampler") == "balanced"
    if is_balanced:
        done = 0  # an epoch draws rows, so no row is done
    if loaded.val is not None:
        return RowOrder(run.n_rows, epoch, done, seed, rows)
    if is_balanced:
        raise SettingsError(
            [
                "The run has no validation rows, and `sampler` is 'balanced', which may draw any row, so none can be "
                "held out. Train with validation rows."
            ]
        )
    left = run.n_rows - done - rows
    if left < experiment.effective_batch_size:
        raise SettingsError(
            [
                f"The run has no validation rows, and only {max(0, left):,} rows of its epoch follow the {rows:,} that "
                "a branch trains on, too few to hold out. Give a smaller `--share`, or train with validation rows."
            ]
        )
    return RowOrder(run.n_rows, epoch, done, seed, rows, n_held=min(left, rows))
