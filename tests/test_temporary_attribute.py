"""Attributes that are set for a while."""

from typing import Any

import pytest

from ftaccum.runtime.temporary_attribute import temporary_attribute


class Loud:
    """A class with a method and a property that can be set."""

    def __init__(self) -> None:
        self.own, self._level = 1, 5

    def say(self) -> str:
        return "loud"

    @property
    def level(self) -> int:
        return self._level

    @level.setter
    def level(self, value: int) -> None:
        self._level = value


class Quiet(Loud):
    def say(self) -> str:
        return "quiet"


@pytest.mark.parametrize("name", ["own", "say", "level", "new", "__class__"])
def test_an_attribute_is_set_and_the_object_is_as_before_afterwards(name: str) -> None:
    owner: Any = Loud()
    before, value = dict(vars(owner)), Quiet if name == "__class__" else 7
    with pytest.raises(ZeroDivisionError), temporary_attribute(owner, name, value):  # noqa: PT012
        assert getattr(owner, name) == value
        raise ZeroDivisionError
    assert vars(owner) == before
    assert type(owner) is Loud
    assert owner.say() == "loud"


def test_attributes_can_be_set_within_each_other() -> None:
    owner: Any = Loud()
    with temporary_attribute(owner, "say", 1):
        with temporary_attribute(owner, "say", 2):
            assert owner.say == 2
        assert owner.say == 1
    assert "say" not in vars(owner)
