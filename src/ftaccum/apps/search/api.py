"""The public function `search`."""

from collections.abc import Callable, Sequence
from typing import Any

from optuna import Study
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage

from .runner import run_search
from .space import Others
from .validation import define_search


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
    verbosity: str = "normal",
    **arguments: Any,
) -> Study:
    """Search for the best number of accumulation steps and learning rate at a fixed physical batch size.

    Each trial is a `test_fine_tuning` run from the same weights on the same rows in the same order. Its value is the
    validation loss of its last evaluation, or the metric that `metric_for_best` names. The search minimizes this value,
    or maximizes it if greater values are better. Trials are compared and pruned after the same numbers of rows,
    whatever their effective batch sizes. The same call with the same storage resumes the search, and several callers
    can share one study.

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
        trade_time: minimize the training time as a second objective. `study.best_trials` are the best trade-offs.
            Nothing is pruned.
        refit: at the end, run the best trial again and save its model to `output_dir/best/model`.
        output_dir: folder for the study, a folder per trial, the table, plots, and `report.html`.
        progress: show a line per trial, and progress bars in a terminal or a notebook.
        verbosity: "quiet" prints only warnings; "debug" also logs the messages of the trials' runs.
        **arguments: further arguments of `test_fine_tuning`, for all trials. `metric_for_best` and `greater_is_better`
            define the value of a trial. Each trial gets deep copies of the `callbacks`, so that their state does not
            pass from one trial to the next. With `n_workers` above 1, it must be possible to pickle them.

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
    return run_search(
        define_search(
            model_factory,
            {
                "config": config,
                "train_data": train_data,
                "val_data": val_data,
                "batch_size": batch_size,
                "verbosity": verbosity,
                **arguments,
            },
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
            accumulation_steps=accumulation_steps,
            learning_rate=learning_rate,
            space=space,
            output_dir=output_dir,
            progress=progress,
        )
    )
