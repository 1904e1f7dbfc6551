"""Uses that once gave wrong results silently: each is now exact, or refused with a message."""

from collections import Counter

import pytest

from ftaccum import DataError, SettingsError
from silent_errors import all_cases
from silent_errors.case import Case

_FAST = 2  # cases of each kind; the others run with the slow tests


def parameters() -> list[object]:
    seen: Counter[int] = Counter()
    found = []
    for case in all_cases():
        seen[case.kind] += not case.slow
        marks = [pytest.mark.slow] if case.slow or seen[case.kind] > _FAST else []
        found.append(pytest.param(case, id=f"{case.kind}: {case.name}", marks=marks))
    return found


@pytest.mark.parametrize("case", parameters())
def test_use_is_exact_or_refused(case: Case) -> None:
    if case.refused is None:
        assert case.run() <= case.tolerance
    else:
        with pytest.raises((DataError, SettingsError), match=case.refused):
            case.run()
