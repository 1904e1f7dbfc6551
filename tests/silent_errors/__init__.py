"""Uses that once trained silently on a wrong gradient, wrong data or a wrong learning rate.

Each module holds the cases of a few kinds. A case trains through the public API and returns how far the result is from
plain PyTorch's, or raises the error that refuses it. `tests/test_silent_errors.py` runs them all, and
`scripts/silent_error_table.py` prints them as a table, also for another version of the package.
"""

import importlib
import pkgutil

from .case import CASES, Case


def all_cases() -> list[Case]:
    """Return the cases of all modules, by kind."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return sorted(CASES, key=lambda case: case.kind)
