"""Run a search from start to end."""

from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from optuna import Study

from ...errors import SettingsError
from ...runtime.signals import StopSignals
from ...tracking.hub import check_hub
from .definition import Search
from .launcher import run_workers
from .processes import OutOfStepError, open_trial_processes
from .progress import SearchProgress
from .refit import refit
from .reports import write_reports
from .study import open_study
from .worker import ON_INTERRUPT, TrialExecutor, Worker, follow


def run_search(search: Search) -> Study:
    """Run trials until the study has enough, and report the result. Call it on all processes."""
    with open_trial_processes() as processes:
        if search.settings.n_workers > 1 and processes.size > 1:
            raise SettingsError(
                [
                    f"`n_workers` is {search.settings.n_workers}, but {processes.size} processes were launched to run "
                    "each trial together. Use one of the two, or launch several times with the same `storage`."
                ]
            )
        if search.settings.refit and (repository := search.fixed["push_to_hub"]) is not None:
            processes.orders.run_on_main(lambda: check_hub(repository))
        executor = TrialExecutor(search, processes, StopSignals(ON_INTERRUPT))
        with executor.stop_signals.kept(), _silent_optuna():
            study = _run_main(executor) if processes.is_main else _copy_study(*follow(executor))
        if search.settings.refit:
            refit(executor, study)
        return study


def _run_main(executor: TrialExecutor) -> Study:
    """Run the search on the main process. Send the other processes a copy of the study, or None after an error."""
    try:
        study = _run_trials(executor)
        executor.stop_signals.check()
    except OutOfStepError:  # the other processes are not receiving
        raise
    except BaseException:
        executor.processes.orders.broadcast(None)
        raise
    executor.processes.orders.broadcast((study.study_name, study.directions, study.get_trials()))
    return study


def _run_trials(executor: TrialExecutor) -> Study:
    search, num_processes = executor.search, executor.processes.size
    study, storage = open_study(search, num_processes)
    with SearchProgress(study, search, storage, num_processes) as progress:
        if search.settings.n_workers > 1:
            run_workers(search, executor.stop_signals, study, progress.update)
        else:
            Worker(executor, study, storage).work(progress.update)
    if search.folder is not None:
        write_reports(study, search.folder)
    return study


@contextmanager
def _silent_optuna() -> Iterator[None]:
    """Silence Optuna's messages. The search shows its trials itself."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _copy_study(
    name: str, directions: list[optuna.study.StudyDirection], trials: list[optuna.trial.FrozenTrial]
) -> Study:
    study = optuna.create_study(study_name=name, directions=directions)
    study.add_trials(trials)
    return study
