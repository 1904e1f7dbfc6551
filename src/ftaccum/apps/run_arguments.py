"""The arguments of a run that a command does not give."""

import inspect
from typing import Any

from ..fine_tuning import test_fine_tuning


def default_arguments() -> dict[str, Any]:
    """Return the arguments of `test_fine_tuning` with their defaults."""
    return {name: parameter.default for name, parameter in inspect.signature(test_fine_tuning).parameters.items()}
