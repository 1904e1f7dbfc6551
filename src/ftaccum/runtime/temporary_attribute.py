"""Set an attribute of an object for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ABSENT = object()


@contextmanager
def temporary_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of an object, and restore it on exit.

    An attribute that only the class had, such as a method, or none at all, is deleted from the object again.
    """
    before, was_own = getattr(owner, name, _ABSENT), _is_own(owner, name)
    setattr(owner, name, value)
    is_new = before is _ABSENT or (_is_own(owner, name) and not was_own)
    try:
        yield
    finally:
        if is_new:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _is_own(owner: Any, name: str) -> bool:
    return name in getattr(owner, "__dict__", ())
