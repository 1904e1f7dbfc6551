"""The rule of `class_weights`."""

from typing import Annotated, Any

from ..fields import Rule, is_number


def _read_weights(value: Any) -> Any:
    try:
        return [float(word) for word in value.split(",")]
    except (AttributeError, ValueError):  # not text, or not numbers
        return value


_weights = Rule(
    lambda v: v == "balanced" or (isinstance(v, list | tuple) and min(v) > 0 and all(map(is_number, v))),
    "'balanced', or a list of one positive number per class, such as [1, 2.5] or '1,2.5',",
    _read_weights,
)
ClassWeights = Annotated[str, _weights]  # one command-line word, as for `Names`
