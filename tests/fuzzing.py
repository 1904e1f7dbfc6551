"""The number of examples of a property."""

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings


def fuzz(examples: int) -> Callable[[Any], Any]:
    """Return settings for this many examples, always the same. To try more examples, drawn anew, run:

    FTACCUM_FUZZ=2000 python -m pytest tests/test_fuzz.py --timeout 0
    """
    by_hand = int(os.environ.get("FTACCUM_FUZZ", "0"))
    return settings(
        max_examples=by_hand or examples,
        derandomize=not by_hand,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
