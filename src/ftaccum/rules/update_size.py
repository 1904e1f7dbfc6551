"""The rules of the settings that size updates and micro-batches."""

import itertools
from collections.abc import Sequence
from typing import Annotated, Any

from ..fields import Rule, is_int, is_number, is_positive_int

SizeOrAuto = Annotated[int | str, Rule(lambda v: v == "auto" or is_positive_int(v), "a positive integer or 'auto'")]
Pairs = Sequence[Sequence[int]]


def _is_schedule(value: Any) -> bool:
    pairs = isinstance(value, list | tuple) and all(isinstance(p, list | tuple) and len(p) == 2 for p in value)
    if not (value and pairs and all(is_int(u) and is_positive_int(k) for u, k in value)):
        return False
    updates = [u for u, _ in value]
    return updates[0] == 0 and all(one < next_ for one, next_ in itertools.pairwise(updates))


def _read_steps(value: Any) -> Any:
    """Parse text such as '0:2,100:8' into pairs, and return any other value unchanged."""
    if not isinstance(value, str) or ":" not in value:
        return value
    try:
        return [[int(update), int(k)] for update, k in (pair.split(":") for pair in value.split(","))]
    except ValueError:
        return value


Steps = Annotated[
    int | str | Pairs,
    Rule(
        lambda v: is_positive_int(v) or _is_schedule(v),
        "a positive integer, or pairs (from_update, k) in ascending order, with the first from update 0 and every k "
        "positive, such as '0:2,100:8'",
        _read_steps,
    ),
]
Costs = Annotated[
    list[float],
    Rule(
        lambda v: (
            isinstance(v, list | tuple) and len(v) == 3 and all(is_number(c) and 0 <= c < 1e30 for c in v) and any(v)
        ),
        "three non-negative numbers below 1e30, at least one of them above 0, such as [64, 1, 0.0005]",
    ),
]
