"""The dimensions of a search, and the arguments that a trial draws from them."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import BaseTrial

from ...arguments import parse_settings
from ...errors import SettingsError, refuse
from ...planning.batch_size import rate_factor
from ...porting.keywords import argument_names
from ...training.optimizer import CoupledBeta2
from ...training.preflight import faults_of_optimization
from ..run_arguments import default_arguments
from .settings import SearchSettings, reserved

STEPS, RATE, COUPLED = "gradient_accumulation_steps", "learning_rate", "coupled_beta2"
Others = Mapping[str, BaseDistribution] | Callable[[BaseTrial], Mapping[str, Any]]
_ARGUMENTS = default_arguments()


@dataclass(frozen=True)
class Space:
    """The dimensions of a search.

    Attributes:
        steps: distribution of k, the number of accumulation steps.
        rate: distribution of the learning rate, for the reference batch size if it is coupled; or a fixed number.
        others: distributions of further arguments by name, or a function of the trial that returns arguments.
        couple_learning_rate: how the learning rate scales with the effective batch size: "none", "sqrt" or "linear".
        couple_beta2: whether Adam's β2 scales with the effective batch size.
        reference: effective batch size at which coupled values are not scaled; None: that of k = 1.
    """

    steps: CategoricalDistribution | IntDistribution
    rate: FloatDistribution | float
    others: Others
    couple_learning_rate: str = "none"
    couple_beta2: bool = False
    reference: int | None = None

    def candidates(self) -> list[int]:
        """Return all candidates for k."""
        if isinstance(self.steps, CategoricalDistribution):
            return [k for k in self.steps.choices if isinstance(k, int)]
        return list(range(self.steps.low, self.steps.high + 1, self.steps.step))

    def suggest(self, trial: BaseTrial, fixed: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
        """Return all arguments of a trial, those that all trials share and its scaling of β2 included.

        Args:
            trial: the trial, which proposes the values.
            fixed: the arguments that all trials share.
            batch_size: rows of an update at k = 1, over all processes.

        Raises:
            SettingsError: if a function of the trial returns arguments that cannot vary.
        """
        k = _suggest(trial, STEPS, self.steps)
        rate = self.rate if isinstance(self.rate, float) else _suggest(trial, RATE, self.rate)
        if callable(self.others):
            others = dict(self.others(trial))
            faults = _faults_of_names(others)
            refuse(faults)
        else:
            others = {name: _suggest(trial, name, distribution) for name, distribution in self.others.items()}
        ratio = k * batch_size / (self.reference or batch_size)
        scale = rate_factor(self.couple_learning_rate, ratio)
        arguments = {**fixed, **others, STEPS: k, RATE: rate * scale}
        return arguments | ({COUPLED: CoupledBeta2(ratio)} if self.couple_beta2 else {})

    def dimensions(self) -> dict[str, BaseDistribution]:
        """Return the distributions that are known before a trial, by argument."""
        rate = {} if isinstance(self.rate, float) else {RATE: self.rate}
        return {STEPS: self.steps, **rate, **({} if callable(self.others) else self.others)}


def read_dimensions(words: Sequence[str]) -> dict[str, BaseDistribution]:
    """Read dimensions from command-line arguments: `name=low:high`, `name=low:high:log`, or `name=one,two`.

    Raises:
        SettingsError: for arguments of another form.
    """
    dimensions, faults = {}, []
    for word in words:
        name, _, values = word.partition("=")
        try:
            dimensions[name] = _read_distribution(name, values)
        except ValueError:
            faults.append(
                f"`space` has {word!r}. Give name=lowest:highest, with :log at the end for a logarithmic scale, such "
                "as weight_decay=1e-4:0.1:log; or name=one,two, such as lr_scheduler=linear,cosine."
            )
    refuse(faults)
    return dimensions


def _read_distribution(name: str, values: str) -> BaseDistribution:
    if ":" not in values:
        if not values:
            raise ValueError
        return CategoricalDistribution([_read_value(value) for value in values.split(",")])
    low, high, *log = values.split(":")
    if log not in ([], ["log"]):
        raise ValueError
    counted = not isinstance(_ARGUMENTS.get(name), float)
    if counted and low.isdigit() and high.isdigit():
        return IntDistribution(int(low), int(high), log=bool(log))
    return FloatDistribution(float(low), float(high), log=bool(log))


def _read_value(word: str) -> int | float | str | bool | None:
    named = {"true": True, "false": False, "none": None}
    if word.lower() in named:
        return named[word.lower()]
    for number in (int, float):
        with suppress(ValueError):
            return number(word)
    return word


def make_space(
    settings: SearchSettings,
    accumulation_steps: Sequence[int] | IntDistribution | CategoricalDistribution,
    learning_rate: Sequence[float] | FloatDistribution | float,
    others: Others | None,
    fixed: Mapping[str, Any],
) -> Space:
    """Return the space that the user's arguments define. It always includes k = 1.

    Args:
        settings: the settings of the search, which decide how learning rate and β2 are coupled.
        accumulation_steps: the candidates for k.
        learning_rate: the range of the learning rate, or one rate.
        others: distributions of further arguments, or a function of the trial that returns arguments.
        fixed: the arguments that all trials share.

    Raises:
        SettingsError: with all faults, including values that a trial could draw but a run could not use.
    """
    steps, faults = _steps(accumulation_steps)
    rate, more = _rate(learning_rate)
    others = {} if others is None else others
    faults += more + _faults_of_others(others)
    if faults or steps is None or rate is None:
        raise SettingsError(faults)
    space = Space(
        steps, rate, others, settings.couple_learning_rate, settings.couple_beta2, settings.reference_batch_size
    )
    _try_values(space, fixed)
    return space


def _steps(given: Any) -> tuple[CategoricalDistribution | IntDistribution | None, list[str]]:
    fault = (
        f"`accumulation_steps` must be positive integers, such as (1, 2, 4, 8), or an IntDistribution from 1 on, but "
        f"is {given!r} instead. Give the numbers of micro-batches per update to try."
    )
    if isinstance(given, IntDistribution):
        return (given, []) if given.low == 1 else (None, [fault])
    choices = given.choices if isinstance(given, CategoricalDistribution) else given
    if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices:
        return None, [fault]
    if not all(isinstance(k, int) and not isinstance(k, bool) and k > 0 for k in choices):
        return None, [fault]
    return CategoricalDistribution(sorted({1, *choices})), []


def _rate(given: Any) -> tuple[FloatDistribution | float | None, list[str]]:
    if isinstance(given, FloatDistribution):
        return given, []
    if isinstance(given, Sequence) and len(given) == 1:  # a single number from the command line
        given = given[0]
    if isinstance(given, int | float) and not isinstance(given, bool):
        return float(given), []
    try:
        low, high = map(float, given)
        if 0 < low < high < math.inf:
            return FloatDistribution(low, high, log=True), []
    except (TypeError, ValueError):
        pass
    return None, [
        f"`learning_rate` must be (lowest, highest), a number or a FloatDistribution, but is {given!r} instead. Give "
        "two positive rates, the lower one first, such as (1e-5, 1e-3)."
    ]


def _faults_of_others(others: Any) -> list[str]:
    if callable(others):
        return []
    if not isinstance(others, Mapping):
        return [
            f"`space` must be a dict of Optuna distributions by argument, or a function of the trial, but is "
            f"{others!r} instead. Give `{{'weight_decay': FloatDistribution(1e-4, 0.1, log=True)}}`, for example."
        ]
    return _faults_of_names(others) + [
        f"`space` has {value!r} for {name!r}, which is not a distribution. Give one from `optuna.distributions`."
        for name, value in others.items()
        if not isinstance(value, BaseDistribution)
    ]


def _faults_of_names(names: Mapping[str, Any]) -> list[str]:
    known = argument_names("test_fine_tuning", _ARGUMENTS)
    unknown = [
        f"`space` has {name!r}, which is not an argument of `test_fine_tuning`{known.hint(name)}"
        for name in names
        if name not in _ARGUMENTS
    ]
    reasons = ((name, reserved(name)) for name in names)
    return unknown + [f"`space` cannot vary {name!r}: {why}. Leave it out." for name, why in reasons if why]


def _try_values(space: Space, fixed: Mapping[str, Any]) -> None:
    """Raise SettingsError if a run could not use an end or a choice of a dimension."""
    faults: list[str] = []
    values = {name: _extremes(distribution) for name, distribution in space.dimensions().items()}
    if isinstance(space.rate, float):
        values[RATE] = [space.rate]
    for name, each in values.items():
        for value in each:
            found = faults_of_optimization({**fixed, name: value})
            try:
                parse_settings({**fixed, "push_to_hub": None, name: value})  # trials upload nothing
            except SettingsError as error:
                found += error.faults
            faults += [fault for fault in found if fault not in faults]
    refuse(faults)


def _extremes(distribution: BaseDistribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return [distribution.low, distribution.high]


def _suggest(trial: BaseTrial, name: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case CategoricalDistribution():
            return trial.suggest_categorical(name, distribution.choices)
        case IntDistribution():
            return trial.suggest_int(
                name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
            )
        case FloatDistribution():
            return trial.suggest_float(
                name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
            )
    raise AssertionError(distribution)
