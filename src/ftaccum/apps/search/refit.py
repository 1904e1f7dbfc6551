"""Run the best trial of a search again, as an ordinary run that saves its model."""

import json
from pathlib import Path
from typing import Any

from optuna import Study
from optuna.trial import FixedTrial, FrozenTrial

from ...runtime.atomic_files import atomic_write
from ...runtime.progress_bar import print_above_bars
from ...tracking.result import Result
from ...training.callbacks import Callback
from .tables import best_trial
from .trial import train_new_model
from .worker import TrialExecutor


def refit(executor: TrialExecutor, study: Study) -> None:
    """Run the best trial again, unless an earlier call did. Call it on all processes."""
    search, orders = executor.search, executor.processes.orders
    best = orders.run_on_main(lambda: best_trial(study))
    if best is None or search.folder is None:
        return
    folder, identity = search.folder / "best", _identity_of(best, study)
    if orders.run_on_main(lambda: _is_finished(folder, identity)):
        _report(executor, f"The best trial, {best.number}, was already run again. Its model is in {folder / 'model'}.")
        return
    _report(executor, f"Running the best trial, {best.number}, again:")
    orders.run_on_main(lambda: _record_of(folder).unlink(missing_ok=True))
    arguments = executor.arguments_of(FixedTrial(best.params, best.number))
    arguments |= {"output_dir": str(folder), "progress": search.progress}
    result = train_new_model(search.model_factory, arguments, Callback())
    orders.run_on_main(lambda: _finish(folder, identity, result))


def _report(executor: TrialExecutor, sentence: str) -> None:
    if executor.processes.is_main and not executor.search.is_quiet:
        print_above_bars(sentence)


def _identity_of(trial: FrozenTrial, study: Study) -> dict[str, Any]:
    """Return the values that distinguish a trial from those of other studies that used the folder."""
    return {"study": study.study_name, "trial": trial.number, "params": trial.params, "values": trial.values}


def _record_of(folder: Path) -> Path:
    return folder / "trial.json"


def _is_finished(folder: Path, identity: dict[str, Any]) -> bool:
    """Return whether the folder holds the model of that trial."""
    record = _record_of(folder)
    return record.exists() and (folder / "model").exists() and json.loads(record.read_text()) == identity


def _finish(folder: Path, identity: dict[str, Any], result: Result) -> None:
    """Record which trial the model in the folder is from, if all outputs could be written."""
    if not result.unwritten:
        with atomic_write(_record_of(folder)) as partial:
            partial.write_text(json.dumps(identity, indent=2) + "\n")
