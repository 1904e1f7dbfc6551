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
from ...runtime.signals import StopSignals
from ...runtime.team import LostError, Team
from ...training.config import RunConfig
from ...training.run import run_training
from .definition import Search
from .launcher import run_workers
from .opening import open_study
from .progress import SearchProgress
from .reports import write_reports
from .retry import IF_INTERRUPTED
from .tables import best_trial
from .trial import seeded_model
from .worker import TrialRunner, arguments_of, follow


def run_search(search: Search) -> Study:
    """Runs trials until there are enough, and says what came of them. All processes of a team call it alike."""
    team = Team()
    try:
        return _conducted(search, team)
    finally:
        team.close()


def _conducted(search: Search, team: Team) -> Study:
    if search.settings.n_workers > 1 and team.size > 1:
        raise SettingsError(
            [
                f"`n_workers` is {search.settings.n_workers}, but {team.size} processes were launched to run each "
                "trial together. Give one of the two, or launch several times with one `storage`."
            ]
        )
    stop_signals = StopSignals(IF_INTERRUPTED)
    with stop_signals.kept(), _silent_optuna():
        study = _main(search, team, stop_signals) if team.is_main else _copied(*follow(search, team, stop_signals))
    if search.settings.refit:
        _refit(search, team, study)
    return study


def _main(search: Search, team: Team, stop_signals: StopSignals) -> Study:
    try:
        study = _led(search, team, stop_signals)
        stop_signals.check()
    except LostError:  # nobody would listen
        raise
    except BaseException:
        team.told(("end", None))
        raise
    team.told(("end", (study.study_name, study.directions, study.get_trials())))
    return study


def _led(search: Search, team: Team, stop_signals: StopSignals) -> Study:
    study, storage = open_study(search, team)
    with SearchProgress(study, search, storage, team.size) as progress:
        if search.settings.n_workers > 1:
            run_workers(search, stop_signals, study, progress.update)
        else:
            TrialRunner(search, team, stop_signals, study, storage).work(progress.update)
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


def _refit(search: Search, team: Team, study: Study) -> None:
    """The best trial once more, as an ordinary run, whose model is kept."""
    best = team.decided(lambda: best_trial(study))
    if best is None or search.folder is None:
        return
    arguments = arguments_of(search, FixedTrial(best.params, best.number), team)
    arguments |= {"output_dir": str(search.folder / "best"), "progress": search.progress}
    if team.is_main:
        tqdm.write(f"The best, trial {best.number}, once more:", file=sys.stdout)
    model = seeded_model(search.model_factory, arguments["random_seed"])
    run_training(RunConfig.from_arguments({**arguments, "model": model}))
