"""Check the arguments of a search, and build its definition."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import InMemoryStorage
from torch import nn
from torch.optim import Optimizer

from ...arguments import find_faults, read_settings
from ...data.iterable import is_stream
from ...errors import refuse
from ...porting.keywords import argument_names, unknown_arguments
from ...runtime.accelerator import is_first_process, requested_processes
from ...tracking.selection import LOSS, Criterion, fault_of_criterion
from ...training.config import faults_of_config
from ...training.preflight import faults_before_loading
from ...training.trainer_callbacks import fault_of_callbacks
from ..run_arguments import default_arguments
from .definition import Search
from .settings import SearchSettings
from .space import STEPS, Others, Space, make_space
from .study import check_study

_RUN = default_arguments()
_OWN = ("accumulation_steps", "learning_rate", "space", "output_dir", "progress")
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
_NAMES = argument_names(
    "search",
    ["accumulation_steps", "space", *SearchSettings.__dataclass_fields__, *_RUN],
    renamed={STEPS: "accumulation_steps"},
    reasons=_REFUSED,
)


def check_before_loading(arguments: Mapping[str, Any]) -> None:
    """Check the arguments of a search before its models and rows are loaded, and compare them with its study, if any.

    Args:
        arguments: the arguments of `search` without model, rows and tokenizer; but with `val_data`, a name or None.

    Raises:
        SettingsError: with all faults, for the arguments; or if the storage has a study with different settings.
    """
    named = {name: arguments[name] for name in _OWN}
    settings = {name: value for name, value in arguments.items() if name in SearchSettings.__dataclass_fields__}
    others = {name: value for name, value in arguments.items() if name not in {*_OWN, *settings}}
    is_first = is_first_process()
    search = define_search(lambda: None, others, settings, **named, looks_at_files=is_first)
    if is_first:
        check_study(search, requested_processes())


def define_search(
    model_factory: Callable[[], Any],
    arguments: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    accumulation_steps: Sequence[int] | IntDistribution | CategoricalDistribution,
    learning_rate: Sequence[float] | FloatDistribution | float,
    space: Others | None,
    output_dir: str | None,
    progress: bool,
    looks_at_files: bool = False,
) -> Search:
    """Check the arguments of a search, and return its definition. See `search` for the arguments and errors.

    Args:
        model_factory: returns a new model.
        arguments: arguments of `test_fine_tuning`.
        given: the fields of `SearchSettings`.
        looks_at_files: whether to check that the output folder can be created.
    """
    settings = read_settings(SearchSettings, given)
    if isinstance(learning_rate, int | float):
        arguments = {**arguments, "learning_rate": learning_rate}
    fixed = _fixed_arguments(arguments, settings.seed)
    _check(settings, model_factory, fixed, output_dir, looks_at_files=looks_at_files)
    refuse(_faults_of_shared(fixed, space))
    varied = make_space(settings, accumulation_steps, learning_rate, space, fixed)
    refuse(_faults_of_comparison(varied, fixed))
    folder = None if output_dir is None else Path(output_dir)
    return Search(model_factory, fixed, varied, settings, folder, progress)


def _fixed_arguments(arguments: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return the arguments of `test_fine_tuning` that all trials share, without the model.

    Args:
        arguments: those that the search was given.
        seed: the default of `random_seed`.

    Raises:
        SettingsError: for names that `test_fine_tuning` does not have, or that a search does not accept.
    """
    faults = unknown_arguments("search", arguments, _NAMES)
    faults += [_REFUSED[name] for name in arguments if name in _REFUSED]
    refuse(faults)
    fixed = {name: default for name, default in _RUN.items() if name != "model"}
    return fixed | {"random_seed": seed, **arguments}


def _check(
    settings: SearchSettings,
    model_factory: Any,
    fixed: Mapping[str, Any],
    output_dir: str | None,
    *,
    looks_at_files: bool,
) -> None:
    """Raise SettingsError with all faults that can be found without a model."""
    run = {**fixed, "output_dir": output_dir}
    faults = find_faults(settings) + faults_before_loading(run, looks_at_files=looks_at_files)
    faults += faults_of_config(fixed["config"]) + _faults_of_runs(model_factory, fixed)
    faults += _faults_of_search(settings, fixed, output_dir)
    refuse(faults)


def _faults_of_shared(fixed: Mapping[str, Any], space: Others | None) -> list[str]:
    """Return a sentence for each fault of the callbacks and of the objective, which all trials share."""
    has_metrics = fixed["compute_metrics"] is not None or callable(space)  # a function of the trial may return one
    objective = fault_of_criterion(fixed["metric_for_best"], fixed["greater_is_better"], has_metrics)
    return [fault for fault in (objective, _fault_of_callbacks(fixed["callbacks"])) if fault]


def _fault_of_callbacks(callbacks: Any) -> str | None:
    """Return a message that says why `callbacks` cannot be used in a search, or None if they can."""
    if fault := fault_of_callbacks(callbacks):
        return fault
    for callback in callbacks:
        try:
            copy.deepcopy(callback)
        except Exception as error:  # raised by the callback's class, or by what it holds
            name = type(callback).__name__
            return (
                f"`callbacks` contains a {name}, but each trial needs its own copy, and copying it raised {error!r}. "
                f"Give {name} a `__deepcopy__` method, or let a function as `space` return new `callbacks` for each "
                "trial."
            )
    return None


def _faults_of_comparison(space: Space, fixed: Mapping[str, Any]) -> list[str]:
    """Return a sentence if the validation losses of trials cannot be compared."""
    by_loss = Criterion.of_settings(fixed["metric_for_best"], fixed["greater_is_better"]).metric == LOSS
    steps = space.candidates()
    if fixed["loss_over"] != "window" or not by_loss or len(steps) == 1:
        return []
    return [
        "`loss_over` is 'window', so a validation loss depends on the effective batch size, and a search cannot "
        f"compare those of trials with `accumulation_steps` from {min(steps)} to {max(steps)}. Name a metric of "
        "`compute_metrics` in `metric_for_best`, or give `accumulation_steps=(1,)` and the effective batch size as "
        "`batch_size`."
    ]


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


def _faults_of_search(settings: SearchSettings, fixed: Mapping[str, Any], output_dir: str | None) -> list[str]:
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
            fixed["push_to_hub"] is not None and not settings.refit,
            f"`push_to_hub` is {fixed['push_to_hub']!r}, but `refit` is False, and the trials of a search save no "
            "model. Set `refit=True`, which trains the best one again and uploads it.",
        ),
        (
            settings.n_workers != 1 and in_memory,
            f"`n_workers` is {settings.n_workers}, but the study would be in the memory of one process, which "
            "workers cannot share. Give `output_dir` or another `storage`.",
        ),
    ]
    return [sentence for is_fault, sentence in checks if is_fault]
