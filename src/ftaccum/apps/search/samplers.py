"""Samplers, which propose trials, and pruners, which end them early."""

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np
from optuna import Study
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from .retry import n_counted, position_of
from .settings import SearchSettings


def make_sampler(settings: SearchSettings, study: Study) -> BaseSampler:
    """Return the sampler for a study. The settings name one, or hold an Optuna sampler."""
    # By default, Optuna starts with ten random draws, which would be half of a small search.
    tpe = partial(TPESampler, n_startup_trials=max(4, settings.n_trials // 4))
    kinds: dict[str, Callable[..., BaseSampler]] = {"tpe": tpe, "random": RandomSampler}
    if settings.sampler not in kinds:
        given: Any = settings.sampler
        if n_counted(study):
            given.reseed_rng()  # otherwise it would repeat the draws of the previous start
        return given
    return SeededByTrial(kinds[settings.sampler], settings.seed, study)


class SeededByTrial(BaseSampler):
    """A sampler that is seeded for each trial by the trial's position in the study.

    Proposals then depend only on the trials so far, not on how often the search was restarted. Two workers make
    different draws.
    """

    def __init__(self, kind: Callable[..., BaseSampler], seed: int, study: Study) -> None:
        self._kind, self._seed, self._study = kind, seed, study
        self._number, self._sampler = -1, kind(seed=seed)

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        if trial.number != self._number:
            # The position in the whole study: Hyperband passes only a part of it as `study`.
            mixed = np.random.SeedSequence((self._seed, position_of(self._study, trial))).generate_state(1)[0]
            self._number, self._sampler = trial.number, self._kind(seed=int(mixed))
        return self._sampler

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._of(trial).before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self._of(trial).after_trial(study, trial, state, values)


def make_pruner(pruner: str | BasePruner, steps: Collection[int]) -> BasePruner:
    """Return a pruner by its name, for trials that report at these steps.

    None of the named pruners prunes before a quarter of the budget. Losses say little during the warm-up: on film
    reviews, pruning after an eighth found a good trial less often than no pruning.
    """
    if not isinstance(pruner, str):
        return pruner
    first, budget = sorted(steps)[math.ceil(len(steps) / 4) - 1], max(steps)
    return {
        "successive_halving": lambda: SuccessiveHalvingPruner(min_resource=first, reduction_factor=2),
        "hyperband": lambda: HyperbandPruner(min_resource=first, max_resource=budget, reduction_factor=2),
        "median": lambda: MedianPruner(n_startup_trials=4, n_warmup_steps=first),
        "none": NopPruner,
    }[pruner]()
