"""A search from its beginning to its end."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optuna
from optuna import Study
from optuna.trial import FixedTrial
from tqdm import tqdm

from ...errors import SettingsError
from ...fine_tuning import fine_tuned
from ...runtime.signals import StopSignals
from ...training.callbacks import Callback
from .definition import Search
from .launcher import run_workers
from .opening import open_study
from .processes import OutOfStepError, TrialProcesses, open_trial_processes
from .progress import SearchProgress
from .reports import write_reports
from .retry import IF_INTERRUPTED
from .tables import best_trial
from .trial import seeded_model
from .worker import TrialRunner, arguments_of, follow


def run_search(search: Search) -> Study:
    """Run trials until there are enough, and report the result. All processes call it alike."""
    with open_trial_processes() as processes:
        return _conducted(search, processes)


def _conducted(search: Search, processes: TrialProcesses) -> Study:
    if search.settings.n_workers > 1 and processes.size > 1:
        raise SettingsError(
            [
                f"`n_workers` is {search.settings.n_workers}, but {processes.size} processes were launched to run each "
                "trial together. Give one of the two, or launch several times with one `storage`."
            ]
        )
    stop_signals = StopSignals(IF_INTERRUPTED)
    with stop_signals.kept(), _silent_optuna():
        study = (
            _main(search, processes, stop_signals)
            if processes.is_main
            else _copied(*follow(search, processes, stop_signals))
        )
    if search.settings.refit:
        _refit(search, processes, study)
    return study


def _main(search: Search, processes: TrialProcesses, stop_signals: StopSignals) -> Study:
    try:
        study = _led(search, processes, stop_signals)
        stop_signals.check()
    except OutOfStepError:  # nobody would listen
        raise
    except BaseException:
        processes.orders.broadcast(("end", None))
        raise
    processes.orders.broadcast(("end", (study.study_name, study.directions, study.get_trials())))
    return study


def _led(search: Search, processes: TrialProcesses, stop_signals: StopSignals) -> Study:
    study, storage = open_study(search, processes.size)
    with SearchProgress(study, search, storage, processes.size) as progress:
        if search.settings.n_workers > 1:
            run_workers(search, stop_signals, study, progress.update)
        else:
            TrialRunner(search, processes, stop_signals, study, storage).work(progress.update)
    write_reports(study, search.folder)
    return study


@contextmanager
def _silent_optuna() -> Iterator[None]:
    """Without Optuna's own lines: the board has its own."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _copied(name: str, directions: list[Any], trials: list[Any]) -> Study:
    study = optuna.create_study(study_name=name, directions=directions)
    study.add_trials(trials)
    return study


def _refit(search: Search, processes: TrialProcesses, study: Study) -> None:
    """The best trial once more, as an ordinary run, whose model is kept."""
    best = processes.orders.run_on_main(lambda: best_trial(study))
    if best is None or search.folder is None:
        return
    arguments = arguments_of(search, FixedTrial(best.params, best.number), processes)
    arguments |= {"output_dir": str(search.folder / "best"), "progress": search.progress}
    if processes.is_main:
        tqdm.write(f"The best, trial {best.number}, once more:", file=sys.stdout)
    model = seeded_model(search.model_factory, arguments["random_seed"])
    fine_tuned({**arguments, "model": model}, Callback())
