"""Numbers in JSON, which has no NaN and no infinity."""

import math
from collections.abc import Mapping
from typing import Any


def nan_null(value: float | None) -> float:
    return math.nan if value is None else value


def null_non_finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: null_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [null_non_finite(item) for item in value]
    return value
