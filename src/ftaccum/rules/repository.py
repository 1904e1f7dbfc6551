"""The rule of names of repositories on the Hugging Face Hub."""

import re
from typing import Annotated, Any

from ..fields import Rule

_REPOSITORY = re.compile(r"(?=.{1,96}$)(?!.*(--|\.\.|\.git$))(\w([\w.-]*\w)?/)?\w([\w.-]*\w)?", re.ASCII)


def is_repository_name(value: Any) -> bool:
    """Return whether a value is a valid name of a repository on the Hugging Face Hub."""
    return isinstance(value, str) and _REPOSITORY.fullmatch(value) is not None


Repository = Annotated[
    str, Rule(is_repository_name, "the name of a repository on the Hugging Face Hub, such as 'user/name',")
]
