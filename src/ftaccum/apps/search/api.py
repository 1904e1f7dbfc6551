"""`search`: what users call."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from optuna import Study
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage
from torch import nn
from torch.optim import Optimizer

from ...data.iterable import is_stream
from ...errors import SettingsError
from ...fields import find_faults, read_settings
from ...fine_tuning import test_fine_tuning
from ...planning.micro_batches import DEFAULT_COSTS
from ...settings import parse_settings
from ..parser import nearest
from .definition import Search
from .runner import run_search
from .settings import SearchSettings
from .space import STEPS, Others, space_of

_RUN = inspect.signature(test_fine_tuning).parameters
_SEARCH = ("accumulation_steps", "n_trials", "space", *SearchSettings.__dataclass_fields__)
_NOT_GIVEN = {
    "model": "`model` is one model, and every trial needs its own. Give `model_factory`, a function that makes it.",
    STEPS: f"`{STEPS}` is what is searched. Give the candidates as `accumulation_steps`; (1,) for none.",
    "effective_batch_size": "`effective_batch_size` follows from `accumulation_steps` in each trial. Leave it out.",
    "max_updates": "`max_updates` would give trials of unlike k unlike rows. Leave it out: `n_epochs` is their budget.",
    "learning_rate_scaling": "`learning_rate_scaling` follows a k that changes within a run, and that of a trial does "
    "not. Leave it out; `couple_learning_rate` scales the rate of a trial with its k.",
    "tokens_per_update": "`tokens_per_update` would settle what is searched, `accumulation_steps`. Leave it out.",
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
    """Searches for the number of accumulation steps and the learning rate, at a fixed physical batch.

    Every trial is a `test_fine_tuning` from the same weights on the same rows in the same order, and minimises
    `final_loss`. Trials are compared, and pruned, after the same numbers of rows, whatever their effective batch.
    Called again with the same storage it goes on where it was, and several callers share one study.

    Args:
        model_factory: makes the model of a trial, on the seed of the runs, so that a new head starts alike in all.
        config, train_data, val_data: as `test_fine_tuning` takes them; without `val_data` some rows are held out.
        batch_size: rows of a micro-batch on one process, the same in all trials.
        accumulation_steps: candidates for `gradient_accumulation_steps`: numbers, of which each is a category, or an
            IntDistribution from 1 on. 1 is always among them, and comes first.
        learning_rate: (lowest, highest), searched on a logarithmic scale; a FloatDistribution; or a number, fixed.
        space: further arguments of `test_fine_tuning` to vary: a dict of Optuna distributions by name, or a function of
            the trial that returns a dict of arguments. Not those that would give trials other rows or another budget.
        n_trials: trials in all, over all workers and all starts. Pruned and failed ones count, interrupted ones run
            again.
        couple_learning_rate: "sqrt" or "linear": what is searched is the rate at the reference batch B, and a trial of
            batch B' gets it times √(B'/B) or B'/B; its `user_attrs["learning_rate"]`.
        couple_beta2: β2' = β2^(B'/B), which keeps the half-life of Adam's second moment the same in rows (Marek et al.
            2025, arXiv:2507.07101).
        reference_batch_size: B, rows of an update. None: that of k = 1.
        pruner: "successive_halving", "hyperband", "median", "none", or one of Optuna's.
        n_reports: evaluations of a trial, after equal shares of its rows.
        sampler: "tpe", "random", or one of Optuna's.
        seed: of what is proposed; and of the runs, where `random_seed` is not given.
        storage: where the study is kept: any URL that Optuna knows, `grpc://host:port`, the path of a journal file, or
            a storage of Optuna's. None: SQLite in `output_dir`, or memory without one.
        study_name: in the storage; needed where that is a server's. None: the name of the output folder, or "search".
        n_workers: processes that each run trials, on this machine; with several GPUs each gets one. A trial itself can
            use several processes under `accelerate launch`.
        trade_time: minimise the training time, too: `study.best_trials` are the best trades. Not pruned.
        refit: in the end run the best trial again and save its model to `output_dir/best/model`.
        output_dir: folder for the study, a folder a trial, the table, plots, and `report.html`.
        progress: show bars and a line a trial.
        **arguments: what `test_fine_tuning` takes besides, for all trials.

    Returns:
        The study. Of each trial, `params` are named as the arguments, and `user_attrs` hold `effective_batch_size`,
        `learning_rate` (as used), `rows` trained on, `output_dir`, and where it did not finish, the `reason`. On other
        processes than the first, a copy.

    Raises:
        SettingsError: arguments that cannot be used, all in one message, before any trial; a study of the same name
            that was begun with others.
        DataError: data that cannot be trained on.

    Example:
        >>> study = search(make_model, train_data=rows, batch_size=4, output_dir="outputs/search")
        >>> study.best_params, study.best_value
    """
    given = dict(locals())
    settings = read_settings(SearchSettings, given)
    fixed = _fixed(given, arguments)
    _check(settings, given, fixed)
    return run_search(
        Search(
            model_factory,
            fixed,
            space_of(settings, accumulation_steps, learning_rate, space, fixed),
            settings,
            None if output_dir is None else Path(output_dir),
            progress,
        )
    )


def _fixed(given: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of `test_fine_tuning` but the model, as every trial gets them.

    Raises:
        SettingsError: for names that it does not have, or that a search cannot hand on.
    """
    faults = [
        f"There is no argument `{name}`. {nearest(name, [*_SEARCH, *_RUN])}" for name in arguments if name not in _RUN
    ]
    faults += [_NOT_GIVEN[name] for name in arguments if name in _NOT_GIVEN]
    if faults:
        raise SettingsError(faults)
    defaults = {name: parameter.default for name, parameter in _RUN.items() if name != "model"}
    shared = {name: given[name] for name in ("config", "train_data", "val_data", "batch_size")}
    if arguments.get("planner", True) and arguments.get("planner_costs") is None:
        # Measured costs differ with the load of the machine, and with them how windows are cut and where dropout falls.
        shared["planner_costs"] = list(astuple(DEFAULT_COSTS))
    if isinstance(given["learning_rate"], int | float):
        shared["learning_rate"] = given["learning_rate"]
    return {**defaults, "random_seed": given["seed"], **arguments, **shared}


def _check(settings: SearchSettings, given: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raises SettingsError with every fault that shows before there is a model."""
    faults = find_faults(settings)
    try:
        parse_settings(fixed)
    except SettingsError as error:
        faults += error.faults
    if not callable(given["model_factory"]) or isinstance(given["model_factory"], nn.Module):
        faults.append(
            f"`model_factory` must be a function that makes a model, but is {type(given['model_factory']).__name__} "
            "instead. Each trial starts from a fresh one: give `lambda: AutoModel….from_pretrained(name)`, say."
        )
    if fixed["resume"] is not None or fixed["allow_changed"]:
        faults.append("`resume` and `allow_changed` are of a single run. A search goes on when it is called again.")
    if fixed["batch_size"] == "auto":
        faults.append("`batch_size` must be a number in a search: the physical batch of all trials is the same.")
    if isinstance(fixed["optimizer"], Optimizer):
        faults.append(
            "`optimizer` is an instance, which belongs to one model. Give a function of the parameter groups: each "
            "trial has a model of its own."
        )
    if fixed["val_data"] is None and not fixed["validation_split"]:
        faults.append(
            "A search compares validation losses, but `val_data` is None and `validation_split` is 0. Give one of them."
        )
    if is_stream(fixed["train_data"]):
        faults.append(
            "`train_data` is a stream, but trials are compared after the same rows, which must be known. Take them "
            "first, such as `list(itertools.islice(stream, 10_000))`."
        )
    if fixed["early_stopping_patience"] is not None:
        faults.append(
            f"`early_stopping_patience` is {fixed['early_stopping_patience']}, which would give trials unlike budgets. "
            "Leave it out: a `pruner` ends the bad ones."
        )
    if isinstance(settings.storage, str) and _shared(settings.storage) and settings.study_name is None:
        faults.append("`storage` is one that others may use as well. Name your study in it: `study_name`.")
    if settings.refit and given["output_dir"] is None:
        faults.append("`refit` saves a model, but `output_dir` is None. Name a folder.")
    in_memory = isinstance(settings.storage, InMemoryStorage) or (not settings.storage and given["output_dir"] is None)
    if settings.n_workers != 1 and in_memory:
        faults.append(
            f"`n_workers` is {settings.n_workers}, but the study would be in the memory of one. Give `output_dir` or "
            "`storage`."
        )
    if faults:
        raise SettingsError(faults)


def _shared(storage: str) -> bool:
    return "://" in storage and not storage.startswith("sqlite")
