"""The study: made or found, and whether it can be gone on with."""

import time
from collections.abc import Mapping
from typing import Any

import optuna
from optuna import Study
from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.exceptions import DuplicatedStudyError
from optuna.pruners import NopPruner
from optuna.storages import BaseStorage
from optuna.study import StudyDirection

from ...errors import DataError, SettingsError
from .samplers import sampler_of
from .settings import SearchSettings

SETUP = "ftaccum"  # the study's attribute with what it was begun with
_TRIES, _PAUSE = 6, 0.5  # of looking for it, where another worker has just made the study


def open_or_create(
    storage: BaseStorage,
    name: str,
    settings: SearchSettings,
    setup: dict[str, Any],
    dimensions: Mapping[str, BaseDistribution],
    first: dict[str, Any],
) -> Study:
    """The study of this name, made where there is none.

    Args:
        dimensions: of the search, as far as they are known before a trial asks.
        setup: what decides a trial's result besides its parameters; kept with the study.
        first: parameters of the first trial of a new study.

    Raises:
        SettingsError: where there is a study that was begun otherwise, with what differs.
    """
    directions = [StudyDirection.MINIMIZE] * (2 if settings.trade_time else 1)
    try:
        study = optuna.create_study(storage=storage, study_name=name, directions=directions)
    except DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=name)
        _wait_for_setup(study)
    else:
        study.enqueue_trial(first)
    if SETUP not in study.user_attrs:  # last, when the study is as it should be for others
        study.set_user_attr(SETUP, setup)
    _check_setup(study, setup)
    _check_dimensions(study, dimensions)
    study.sampler = sampler_of(settings, study)
    study.pruner = NopPruner()  # until the rows of a trial are known
    return study


def _wait_for_setup(study: Study) -> None:
    """Until whoever made the study has done so; not for ever: it may be one that was made without us."""
    for _ in range(_TRIES):
        if SETUP in study.user_attrs:
            return
        time.sleep(_PAUSE)


def _check_setup(study: Study, setup: dict[str, Any]) -> None:
    begun = study.user_attrs[SETUP]
    faults = [
        f"The study {study.study_name!r} was begun with `{name}` {begun[name]!r}, and is now to go on with {value!r}. "
        "Trials could not be compared: give the same, or another `study_name`."
        for name, value in setup.items()
        if name in begun and begun[name] != value
    ]
    if faults:
        raise SettingsError(faults)


def _check_dimensions(study: Study, dimensions: Mapping[str, BaseDistribution]) -> None:
    """Raises SettingsError where Optuna could not take a dimension beside the one of this name that there was."""
    faults = {}
    for trial in study.get_trials(deepcopy=False):
        for name in dimensions.keys() & trial.distributions.keys():
            try:
                check_distribution_compatibility(trial.distributions[name], dimensions[name])
            except ValueError:
                faults[name] = (
                    f"The study {study.study_name!r} has trials with `{name}` from {trial.distributions[name]}, and is "
                    f"now to go on with {dimensions[name]}. Only the ends of a range may change: give another "
                    "`study_name`."
                )
    if faults:
        raise SettingsError(list(faults.values()))


def check_budget(study: Study, rows: int) -> None:
    """Raises DataError where trials before had another budget: other data, in the same study."""
    budget = study.user_attrs.get("budget_rows")
    if budget is None:
        study.set_user_attr("budget_rows", rows)
    elif budget != rows:
        raise DataError(
            f"The trials of the study {study.study_name!r} were given {budget} rows each, and `train_data` now comes "
            f"to {rows}. Trials could not be compared: give the same data, or another `study_name`."
        )
