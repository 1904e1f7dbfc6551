"""Kinds of use that once came out wrong without a word: each is exact now, or refused in a sentence."""

import importlib
import pkgutil

import pytest

import silent_errors
from ftaccum import DataError, SettingsError
from silent_errors.case import CASES, Case

for _module in pkgutil.iter_modules(silent_errors.__path__):
    importlib.import_module(f"silent_errors.{_module.name}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}: {case.name}")
def test_use_is_exact_or_refused(case: Case) -> None:
    if case.refused is None:
        assert case.run() <= case.tolerance
    else:
        with pytest.raises((DataError, SettingsError), match=case.refused):
            case.run()
