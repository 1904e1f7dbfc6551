"""Which options the optimizers that a function makes were given by name or by position."""

import functools
import inspect
import weakref
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch.optim import Optimizer

# By optimizer, the names of the options in the call that made it.
NamedOptions: TypeAlias = MutableMapping[Optimizer, set[str]]


@contextmanager
def record_named_options() -> Iterator[NamedOptions]:
    """Record the options in each call of an optimizer's class.

    An option that is equal to its default cannot be told from the optimizer itself. So the constructors of all classes
    of optimizers are wrapped meanwhile. Those of classes that are defined meanwhile are not.
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
    """Return a constructor that also records the options that it is called with."""
    signature = inspect.signature(constructor)

    @functools.wraps(constructor)
    def record(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        if type(self).__init__ is record:  # and not a subclass's call of it
            named[self] = {*signature.bind_partial(self, *args, **kwargs).arguments, *kwargs}
        constructor(self, *args, **kwargs)

    return record


def _kinds(kind: type[Optimizer]) -> set[type[Optimizer]]:
    """Return a class and all that are derived from it."""
    return {kind}.union(*map(_kinds, kind.__subclasses__()))
