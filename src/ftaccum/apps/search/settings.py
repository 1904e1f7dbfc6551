"""The settings of a search, with their rules; flags for the command line."""

from dataclasses import dataclass, field, fields, make_dataclass
from typing import Annotated, Any, get_type_hints

from ...fields import SCALINGS, Flag, PositiveInt, Rule, Seed, Text, setting
from ...settings import Recipe

PRUNERS = ("successive_halving", "hyperband", "median", "none")
SAMPLERS = ("tpe", "random")


def _named(names: tuple[str, ...], *methods: str) -> Rule:
    listed = ", ".join(map(repr, names))
    kind = f" or one of Optuna's, with the method {methods[0]!r}" if methods else ""
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
        "a URL, the path of a journal file, or a storage of Optuna's",
    ),
]


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How a search is led; what it varies is a Space."""

    n_trials: PositiveInt = setting(20, "trials in all, over all workers and all starts; interrupted ones run again")
    couple_learning_rate: Coupling = setting(
        "none", "scale the rate that is searched with the effective batch: sqrt, linear or none"
    )
    couple_beta2: Flag = setting(False, "keep the half-life of Adam's second moment the same in rows")
    reference_batch_size: PositiveInt | None = setting(
        None, "effective batch at which the coupled values are meant; None: that of k = 1"
    )
    pruner: Pruner = setting(
        "successive_halving", "which trials to end early: successive_halving, hyperband, median or none"
    )
    n_reports: PositiveInt = setting(8, "evaluations of a trial, at equal shares of its rows; it is pruned at these")
    sampler: Sampler = setting("tpe", "what proposes the next trial: tpe or random")
    seed: Seed = setting(42, "seed of what is proposed; of the runs, too, where random_seed is not given")
    storage: Storage | None = setting(
        None, "any URL that Optuna knows, grpc://host:port, or a journal file; None: SQLite in output_dir"
    )
    study_name: Text | None = setting(None, "name of the study in the storage; None: that of the output folder")
    n_workers: PositiveInt = setting(1, "processes that each run trials of the study, on this machine", "--workers")
    trade_time: Flag = setting(False, "minimise the time of training as well: the best trades, without pruning")
    refit: Flag = setting(False, "run the best trial again, and save its model")


@dataclass
class SpaceArguments:
    """What a search varies, as a command line says it."""

    accumulation_steps: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8], metadata={"help": "candidates for gradient_accumulation_steps; always 1"}
    )
    learning_rate: list[float] = field(
        default_factory=lambda: [1e-5, 1e-3], metadata={"help": "lowest and highest rate, on a log scale; or one rate"}
    )
    space: list[str] = field(
        default_factory=list,
        metadata={
            "help": "further options to vary, such as weight_decay=1e-4:0.1:log warmup_steps=0:50 "
            "lr_scheduler=linear,cosine"
        },
    )


_SEARCHED = (
    "gradient_accumulation_steps",
    "learning_rate",
    "effective_batch_size",
    "tokens_per_update",
    "max_updates",
    "learning_rate_scaling",
    "random_seed",
    "early_stopping_patience",
)
_HINTS = get_type_hints(Recipe, include_extras=True)
# The Recipe of every trial, but for what a search settles; its seed is that of the runs, too.
TrialRecipe = make_dataclass(
    "TrialRecipe",
    [
        (f.name, _HINTS[f.name], setting(f.default, f.metadata["help"]))
        for f in fields(Recipe)
        if f.name not in _SEARCHED
    ],
    frozen=True,
    kw_only=True,
)


def reserved(name: str) -> str | None:
    """Why an argument of `test_fine_tuning` is no dimension of a search; None where it may be one."""
    return _RESERVED.get(name)


_SAME = "every trial has the same rows in the same order and the same budget of them"
_OWN = "it is an argument of the search itself"
_RESERVED: dict[str, Any] = {
    **dict.fromkeys(
        (
            "n_epochs",
            "max_updates",
            "remainder",
            "random_seed",
            "validation_split",
            "train_data",
            "val_data",
            "tokenizer",
        ),
        _SAME,
    ),
    **dict.fromkeys(("batch_size", "max_tokens"), "the physical batch of a search is fixed"),
    "early_stopping_patience": "it would give trials unlike budgets; a pruner ends the bad ones",
    **dict.fromkeys(
        ("effective_batch_size", "tokens_per_update", "learning_rate_scaling"),
        "`accumulation_steps` says which batches are tried",
    ),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "learning_rate", "model", "config", "output_dir", "progress"), _OWN
    ),
}
