"""The rule of `class_weights`."""

from typing import Annotated, Any

from ..fields import Rule, is_number


def _read_weights(value: Any) -> Any:
    try:
        return [float(word) for word in value.split(",")] if isinstance(value, str) else value
    except ValueError:  # not numbers
        return value


_weights = Rule(
    lambda v: (
        (isinstance(v, str) and v == "balanced")
        or (isinstance(v, list | tuple) and len(v) > 0 and all(is_number(w) and w > 0 for w in v))
    ),
    "'balanced', or a list of one positive number per class, such as [1, 2.5] or '1,2.5',",
    _read_weights,
)
ClassWeights = Annotated[str, _weights]  # one command-line word, as for `Names`
