"""A record of the options that each optimizer's constructor was called with."""

import functools
import inspect
import weakref
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch.optim import Optimizer

# The names of the options in the call that made each optimizer.
NamedOptions: TypeAlias = MutableMapping[Optimizer, set[str]]


@contextmanager
def record_named_options() -> Iterator[NamedOptions]:
    """Record the options in each call of an optimizer's constructor.

    An optimizer does not show whether an option that equals its default was given. So this context manager wraps the
    constructors of all optimizer classes that exist when it is entered, and restores them on exit.
    """
    named: NamedOptions = weakref.WeakKeyDictionary()
    constructors = {kind: vars(kind)["__init__"] for kind in _kinds(Optimizer) if "__init__" in vars(kind)}
    try:
        for kind, constructor in constructors.items():
            setattr(kind, "__init__", _recording(constructor, named))  # noqa: B010 (mypy forbids the assignment)
        yield named
    finally:
        for kind, constructor in constructors.items():
            setattr(kind, "__init__", constructor)  # noqa: B010


def _recording(constructor: Any, named: NamedOptions) -> Any:
    """Return a constructor that also records the options it is called with."""
    signature = inspect.signature(constructor)

    @functools.wraps(constructor)
    def record(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        if type(self).__init__ is record:  # not called by a subclass's constructor
            named[self] = {*signature.bind_partial(self, *args, **kwargs).arguments, *kwargs}
        constructor(self, *args, **kwargs)

    return record


def _kinds(kind: type[Optimizer]) -> set[type[Optimizer]]:
    """Return a class and all its subclasses."""
    return {kind}.union(*map(_kinds, kind.__subclasses__()))
