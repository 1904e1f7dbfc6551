"""A decorator that answers unknown keyword arguments, instead of Python's TypeError for the first of them."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import ParamSpec, TypeVar

from ..errors import refuse
from .names import KnownNames, python

P = ParamSpec("P")
R = TypeVar("R")


def explain_keywords(
    others: Collection[str] = (), renamed: Mapping[str, str] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator of a function that takes only named arguments.

    The decorated function raises one SettingsError for all keyword arguments that it does not take. It keeps its
    signature for type checkers and for `inspect.signature`.

    Args:
        others: the arguments of `test_fine_tuning`, if the function is another one.
        renamed: for arguments of `test_fine_tuning` that have another name in the function, that name.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__
        known = argument_names(name, inspect.signature(function).parameters, others, renamed or {})

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            refuse(unknown_arguments(name, kwargs, known))
            return function(*args, **kwargs)

        return call

    return decorate


def argument_names(
    function: str,
    here: Collection[str],
    others: Collection[str] = (),
    renamed: Mapping[str, str] | None = None,
    reasons: Mapping[str, str] | None = None,
) -> KnownNames:
    """Return the names that a public function takes; for the arguments see `KnownNames`."""
    return KnownNames(
        [name for name in here if name not in (reasons or {})],
        "argument",
        python,
        elsewhere=dict.fromkeys([name for name in others if name not in here], "`test_fine_tuning`"),
        renamed=renamed or {},
        reasons=reasons or {},
        otherwise="elsewhere" if others else "on the command line",
        listed=f"`help(ftaccum.{function})` lists the arguments.",
    )


def unknown_arguments(function: str, given: Collection[str], known: KnownNames) -> list[str]:
    """Return a sentence for each of the given arguments that a function does not take."""
    return [
        f"`{name}` is not an argument of `{function}`{known.hint(name)}"
        for name in given
        if name not in known.here and name not in known.reasons
    ]
