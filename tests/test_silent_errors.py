"""Uses that once gave wrong results silently: each is now exact, or refused with a message."""

import pytest

from ftaccum import DataError, SettingsError
from silent_errors import all_cases
from silent_errors.case import Case

PARAMETERS = [
    pytest.param(case, id=f"{case.kind}: {case.name}", marks=[pytest.mark.slow] if case.slow else [])
    for case in all_cases()
]


@pytest.mark.parametrize("case", PARAMETERS)
def test_use_is_exact_or_refused(case: Case) -> None:
    if case.refused is None:
        assert case.run() <= case.tolerance
    else:
        with pytest.raises((DataError, SettingsError), match=case.refused):
            case.run()
