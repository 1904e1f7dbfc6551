"""The public function `search`."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna import Study
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage
from torch import nn
from torch.optim import Optimizer

from ...arguments import find_faults, parse_settings, read_settings
from ...data.iterable import is_stream
from ...errors import SettingsError, refuse
from ...fine_tuning import test_fine_tuning
from ..parser import nearest
from .definition import Search
from .runner import run_search
from .settings import SearchSettings
from .space import STEPS, Others, make_space

_RUN = inspect.signature(test_fine_tuning).parameters
_NAMES = ("accumulation_steps", "space", *SearchSettings.__dataclass_fields__, *_RUN)
_REFUSED = {
    "model": "`model` is a single model, but each trial needs a new one. Give `model_factory`, which returns one.",
    STEPS: f"The search sets `{STEPS}`. Give the values to try as `accumulation_steps`; `(1,)` tries no accumulation.",
    "effective_batch_size": "`effective_batch_size` follows from `accumulation_steps` in each trial. Leave it out.",
    "max_updates": "`max_updates` does not suit a search: a trial with more accumulation steps would train on more "
    "rows. Leave it out. `n_epochs` is the budget of each trial.",
    "learning_rate_scaling": "`learning_rate_scaling` is for a `gradient_accumulation_steps` that changes within a "
    "run, but that of a trial is constant. Leave it out; `couple_learning_rate` scales the rate of a trial with its "
    "effective batch size.",
    "tokens_per_update": "`tokens_per_update` would set the accumulation steps, which the search varies. Leave it out.",
}


def search(
    model_factory: Callable[[], Any],
    config: Any = None,
    train_data: Any = None,
    val_data: Any = None,
    *,
    batch_size: int = 4,
    accumulation_steps: Sequence[int] | IntDistribution | CategoricalDistribution = (1, 2, 4, 8),
    learning_rate: Sequence[float] | FloatDistribution | float = (1e-5, 1e-3),
    space: Others | None = None,
    n_trials: int = 20,
    couple_learning_rate: str = "none",
    couple_beta2: bool = False,
    reference_batch_size: int | None = None,
    pruner: str | BasePruner = "successive_halving",
    n_reports: int = 8,
    sampler: str | BaseSampler = "tpe",
    seed: int = 42,
    storage: str | BaseStorage | None = None,
    study_name: str | None = None,
    n_workers: int = 1,
    trade_time: bool = False,
    refit: bool = False,
    output_dir: str | None = None,
    progress: bool = True,
    **arguments: Any,
) -> Study:
    """Search for the best number of accumulation steps and learning rate at a fixed physical batch size.

    Each trial is a `test_fine_tuning` run from the same weights on the same rows in the same order. The search
    minimizes its `final_loss`. Trials are compared and pruned after the same numbers of rows, whatever their effective
    batch sizes. The same call with the same storage resumes the search, and several callers can share one study.

    Args:
        model_factory: returns a new model for each trial. It is called with the random seed of the runs, so that a
            new head starts from the same weights in all trials.
        config, train_data, val_data: as in `test_fine_tuning`. If `val_data` is None, some rows are held out.
        batch_size: rows of a micro-batch on one process, the same in all trials.
        accumulation_steps: candidates for `gradient_accumulation_steps`: numbers, which are treated as categories, or
            an IntDistribution from 1 on. 1 is always included, and is tried first.
        learning_rate: (lowest, highest), searched on a logarithmic scale; a FloatDistribution; or a fixed number.
        space: further arguments of `test_fine_tuning` to vary: a dict of Optuna distributions by name, or a function of
            the trial that returns a dict of arguments. Arguments that would change the rows or the budget of trials
            cannot vary.
        n_trials: total number of trials, over all workers and restarts. Pruned and failed trials count; interrupted
            ones run again.
        couple_learning_rate: "sqrt" or "linear": the search varies the learning rate at the reference batch size B. A
            trial with effective batch size B' uses it times √(B'/B) or B'/B, and records that rate as
            `user_attrs["learning_rate"]`.
        couple_beta2: use β2' = β2^(B'/B), which keeps the half-life of Adam's second moment constant in rows (Marek et
            al. 2025, arXiv:2507.07101).
        reference_batch_size: B, in rows of an update. None: that of k = 1.
        pruner: "successive_halving", "hyperband", "median", "none", or an Optuna pruner.
        n_reports: evaluations per trial, after equal shares of its rows.
        sampler: "tpe", "random", or an Optuna sampler.
        seed: seed of the proposals, and of the runs if `random_seed` is not given.
        storage: storage of the study: any URL that Optuna knows, `grpc://host:port`, the path of a journal file, or
            an Optuna storage. None: SQLite in `output_dir`, or memory without `output_dir`.
        study_name: name of the study in the storage; required on a server. None: the name of the output folder, or
            "search".
        n_workers: number of processes on this machine that run trials. With several GPUs, each gets one. For several
            processes per trial, use `accelerate launch` instead.
        trade_time: minimize the training time as well. `study.best_trials` are the best trade-offs. Nothing is pruned.
        refit: at the end, run the best trial again and save its model to `output_dir/best/model`.
        output_dir: folder for the study, a folder per trial, the table, plots, and `report.html`.
        progress: show progress bars and a line per trial.
        **arguments: further arguments of `test_fine_tuning`, for all trials.

    Returns:
        The study. The `params` of a trial have the names of the arguments. Its `user_attrs` include
        `effective_batch_size`, `learning_rate` (as used), `rows` trained on, `output_dir`, and `reason` if it did not
        finish. Processes other than the main one get a copy.

    Raises:
        SettingsError: if arguments cannot be used, with all faults in one message, before any trial; or if a study of
            the same name was created with different settings.
        DataError: if the data cannot be trained on.

    Example:
        >>> study = search(make_model, train_data=rows, batch_size=4, output_dir="outputs/search")
        >>> study.best_params, study.best_value
    """
    settings = read_settings(
        SearchSettings,
        {
            "n_trials": n_trials,
            "couple_learning_rate": couple_learning_rate,
            "couple_beta2": couple_beta2,
            "reference_batch_size": reference_batch_size,
            "pruner": pruner,
            "n_reports": n_reports,
            "sampler": sampler,
            "seed": seed,
            "storage": storage,
            "study_name": study_name,
            "n_workers": n_workers,
            "trade_time": trade_time,
            "refit": refit,
        },
    )
    shared = {"config": config, "train_data": train_data, "val_data": val_data, "batch_size": batch_size}
    if isinstance(learning_rate, int | float):
        shared["learning_rate"] = learning_rate
    fixed = _fixed_arguments(arguments, shared, seed)
    _check(settings, model_factory, fixed, output_dir)
    varied = make_space(settings, accumulation_steps, learning_rate, space, fixed)
    folder = None if output_dir is None else Path(output_dir)
    return run_search(Search(model_factory, fixed, varied, settings, folder, progress))


def _fixed_arguments(arguments: Mapping[str, Any], shared: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return the arguments of `test_fine_tuning` that all trials share, without the model.

    Args:
        arguments: further arguments of the search.
        shared: arguments that `search` and `test_fine_tuning` have in common.
        seed: the default of `random_seed`.

    Raises:
        SettingsError: for names that `test_fine_tuning` does not have, or that a search does not accept.
    """
    faults = [f"There is no argument `{name}`. {nearest(name, _NAMES)}" for name in arguments if name not in _RUN]
    faults += [_REFUSED[name] for name in arguments if name in _REFUSED]
    refuse(faults)
    fixed = {name: parameter.default for name, parameter in _RUN.items() if name != "model"}
    fixed |= {"random_seed": seed, **arguments, **shared}
    return fixed


def _check(settings: SearchSettings, model_factory: Any, fixed: Mapping[str, Any], output_dir: str | None) -> None:
    """Raise SettingsError with all faults that can be found without a model."""
    faults = find_faults(settings)
    try:
        parse_settings(fixed)
    except SettingsError as error:
        faults += error.faults
    faults += _faults_of_runs(model_factory, fixed) + _faults_of_search(settings, output_dir)
    refuse(faults)


def _faults_of_runs(model_factory: Any, fixed: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each argument that a single run could use but the trials of a search cannot."""
    checks = [
        (
            not callable(model_factory) or isinstance(model_factory, nn.Module),
            f"`model_factory` must be a function that returns a new model, but is {type(model_factory).__name__} "
            "instead. Each trial needs its own model. Give `lambda: AutoModel….from_pretrained(name)`, for example.",
        ),
        (
            fixed["resume"] is not None or bool(fixed["allow_changed"]),
            "`resume` and `allow_changed` are for a single run. Leave them out: a search resumes when called again.",
        ),
        (
            fixed["batch_size"] == "auto",
            "`batch_size` must be a number in a search, but is 'auto' instead. All trials use the same batch size.",
        ),
        (
            isinstance(fixed["optimizer"], Optimizer),
            "`optimizer` is an instance, which belongs to one model, but each trial has its own model. Give a function "
            "of the parameter groups.",
        ),
        (
            fixed["val_data"] is None and not fixed["validation_split"],
            "A search compares validation losses, but `val_data` is None and `validation_split` is 0. Give one of "
            "them.",
        ),
        (
            is_stream(fixed["train_data"]),
            "`train_data` is a stream, but a search compares trials on the same rows and must know them. Give a list "
            "of rows, such as `list(itertools.islice(stream, 10_000))`.",
        ),
        (
            fixed["early_stopping_patience"] is not None,
            f"`early_stopping_patience` is {fixed['early_stopping_patience']}, so trials would train on different "
            "numbers of rows. Leave it out: the `pruner` ends bad trials.",
        ),
    ]
    return [sentence for is_fault, sentence in checks if is_fault]


def _faults_of_search(settings: SearchSettings, output_dir: str | None) -> list[str]:
    """Return a sentence for each setting of the search that contradicts another one."""
    storage = settings.storage
    is_server = isinstance(storage, str) and "://" in storage and not storage.startswith("sqlite")
    in_memory = isinstance(storage, InMemoryStorage) or (not storage and output_dir is None)
    checks = [
        (
            is_server and settings.study_name is None,
            "`storage` may hold other studies as well, but `study_name` is None. Give the study a name.",
        ),
        (
            settings.refit and output_dir is None,
            "`refit` saves a model, but `output_dir` is None. Give a folder.",
        ),
        (
            settings.n_workers != 1 and in_memory,
            f"`n_workers` is {settings.n_workers}, but the study would be in the memory of one process, which "
            "workers cannot share. Give `output_dir` or another `storage`.",
        ),
    ]
    return [sentence for is_fault, sentence in checks if is_fault]
