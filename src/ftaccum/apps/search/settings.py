"""The settings of a search, with their rules and command-line options."""

from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated

from ...fields import SCALINGS, Flag, PositiveInt, Rule, Seed, Text, select_settings, setting, traits_of
from ...settings.groups import OWN_ARGUMENT, SAME_ROWS
from ...settings.recipe import Recipe
from ...settings.runtime import Runtime

PRUNERS = ("successive_halving", "hyperband", "median", "none")
SAMPLERS = ("tpe", "random")


def _named(names: tuple[str, ...], *methods: str) -> Rule:
    listed = ", ".join(map(repr, names))
    kind = f" or one of Optuna's objects with the method {methods[0]!r}" if methods else ""
    return Rule(
        lambda v: v in names if isinstance(v, str) else all(hasattr(v, m) for m in methods or ["-"]), listed + kind
    )


Coupling = Annotated[str, _named(SCALINGS)]
Pruner = Annotated[str, _named(PRUNERS, "prune")]
Sampler = Annotated[str, _named(SAMPLERS, "sample_independent")]
Storage = Annotated[
    str,
    Rule(
        lambda v: (isinstance(v, str) and bool(v)) or hasattr(v, "create_new_study"),
        "a URL, the path of a journal file, or an Optuna storage",
    ),
]

_search = partial(setting, group="search")


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """The settings of a search. A `Space` defines what it varies."""

    n_trials: PositiveInt = _search(20, "total trials over all workers and restarts; interrupted ones run again")
    couple_learning_rate: Coupling = _search(
        "none",
        "multiply the learning rate of a trial by effective batch / reference batch (linear), by the square root of "
        "this (sqrt), or by 1 (none)",
    )
    couple_beta2: Flag = _search(
        False, "adapt beta2 to the effective batch, so that Adam's second moment averages over the same number of rows"
    )
    reference_batch_size: PositiveInt | None = _search(
        None,
        "reference batch: the effective batch size at which learning rate and beta2 are not scaled; None: the one "
        "without accumulation",
    )
    pruner: Pruner = _search(
        "successive_halving", "how to choose trials to end early: successive_halving, hyperband, median or none"
    )
    n_reports: PositiveInt = _search(8, "evaluations per trial, at equal shares of its rows; pruning happens at these")
    sampler: Sampler = _search("tpe", "how to propose the next trial: tpe or random")
    seed: Seed = _search(42, "seed of the proposals, and of the runs if random_seed is not given")
    storage: Storage | None = _search(
        None, "any URL that Optuna knows, grpc://host:port, or a journal file; None: SQLite in output_dir"
    )
    study_name: Text | None = _search(None, "name of the study in the storage; None: that of the output folder")
    n_workers: PositiveInt = _search(1, "processes on this machine that run trials of the study", "--workers")
    trade_time: Flag = _search(False, "minimize loss and training time together (Pareto front); nothing is pruned")
    refit: Flag = _search(False, "run the best trial again, and save its model")


@dataclass
class SpaceArguments:
    """The arguments that a search varies, as command-line options."""

    accumulation_steps: list[int] = _search(
        [1, 2, 4, 8], "candidates for gradient_accumulation_steps; 1 is always included"
    )
    learning_rate: list[float] = _search([1e-5, 1e-3], "lowest and highest rate, on a log scale; or one fixed rate")
    space: list[str] = _search(
        [],
        "further options to vary, such as weight_decay=1e-4:0.1:log warmup_steps=0:50 lr_scheduler=linear,cosine",
    )


# The Recipe that all trials share.
TrialRecipe = select_settings("TrialRecipe", Recipe, lambda traits: not traits.decided_by_search)

_RESERVED = {
    **{f.name: traits_of(f).unsearchable for f in (*fields(Recipe), *fields(Runtime))},
    **dict.fromkeys(("train_data", "val_data", "tokenizer"), SAME_ROWS),
    **dict.fromkeys(("model", "config"), OWN_ARGUMENT),
}


def reserved(name: str) -> str | None:
    """Return the reason why a search cannot vary an argument of `test_fine_tuning`; None if it can."""
    return _RESERVED.get(name) or None
