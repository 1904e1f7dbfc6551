"""What proposes trials, and what ends them early."""

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np
from optuna import Study
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from .retry import counts, place_of
from .settings import SearchSettings


def sampler_of(settings: SearchSettings, study: Study) -> BaseSampler:
    """The sampler that settings name, for a study, or the one of Optuna's that they give."""
    # Optuna's ten draws at random, before what was seen is made use of, would be half of a small search.
    tpe = partial(TPESampler, n_startup_trials=max(4, settings.n_trials // 4))
    kinds: dict[str, Callable[..., BaseSampler]] = {"tpe": tpe, "random": RandomSampler}
    if settings.sampler not in kinds:
        given: Any = settings.sampler
        if any(map(counts, study.get_trials(deepcopy=False))):
            given.reseed_rng()  # or it would draw again what it drew then
        return given
    return SeededByTrial(kinds[settings.sampler], settings.seed, study)


class SeededByTrial(BaseSampler):
    """Draws from a seed and a trial's place in the study: what is proposed depends on the trials so far alone, not on
    how often the search was started again, and two workers do not draw alike."""

    def __init__(self, kind: Callable[..., BaseSampler], seed: int, study: Study) -> None:
        self._kind, self._seed, self._study = kind, seed, study
        self._number, self._sampler = -1, kind(seed=seed)

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        if trial.number != self._number:
            # Not in the study that Optuna hands over, which is a part of it where Hyperband prunes.
            mixed = np.random.SeedSequence((self._seed, place_of(self._study, trial))).generate_state(1)[0]
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


def pruner_of(pruner: str | BasePruner, steps: Collection[int]) -> BasePruner:
    """A pruner by its name, for trials that report at these steps.

    None of them prunes before a quarter of the budget. Until the warm-up is over losses say little: on the film
    reviews, pruning from an eighth on found a good trial less often than not pruning at all.
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
