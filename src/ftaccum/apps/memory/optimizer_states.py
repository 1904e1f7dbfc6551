"""The bytes of state that each named optimizer keeps for a parameter."""

import math
from collections.abc import Callable, Mapping, Sequence

_BLOCK, _SMALLEST = 256, 4096  # bitsandbytes: numbers with one scale; fewest numbers of a tensor that get 8 bits
_STEP = 4  # the number of steps, a float32 for each parameter

Shape = Sequence[int]


def _adamw(shape: Shape, size: int) -> int:
    return 2 * math.prod(shape) * size + _STEP


def _one_moment(shape: Shape, size: int) -> int:
    return math.prod(shape) * size


def _adafactor(shape: Shape, size: int) -> int:
    """Return the bytes of a mean for each row and one for each column of a matrix; else of one for each number."""
    if len(shape) < 2:
        return math.prod(shape) * size + _STEP
    *outer, n_rows, n_columns = shape
    return math.prod(outer) * (n_rows + n_columns) * size + _STEP


def _adamw_8bit(shape: Shape, size: int) -> int:  # noqa: ARG001
    n = math.prod(shape)
    return 2 * (n + 4 * math.ceil(n / _BLOCK)) if n >= _SMALLEST else 2 * 4 * n


# The bytes of state for a parameter of some shape, from the bytes of one of its numbers.
STATES: Mapping[str, Callable[[Shape, int], int]] = {
    "adamw": _adamw,
    "sgd": lambda shape, size: 0,  # noqa: ARG005 (without momentum, as ftaccum makes it)
    "adafactor": _adafactor,
    "lion": _one_moment,
    "muon": _adamw,  # for what is not a hidden matrix
    "adamw_8bit": _adamw_8bit,
    "paged_adamw_8bit": _adamw_8bit,
    "schedule_free_adamw": lambda shape, size: 2 * math.prod(shape) * size,
}

# What a reader should know about some of them.
NOTES: Mapping[str, str] = {
    "sgd": "sgd has no momentum, and so no state.",
    "adafactor": "adafactor keeps a mean for each row and column of a matrix. It cannot step on shards (FSDP2).",
    "muon": "muon keeps one moment for hidden matrices, and two for other weights.",
    "adamw_8bit": "adamw_8bit: 8 bits and a scale per 256 numbers, as bitsandbytes documents it.",
    "paged_adamw_8bit": "paged_adamw_8bit moves its states to host memory when the device has no room for them.",
}


def state_bytes(optimizer: str, shape: Shape, size: int, *, is_hidden: bool) -> int:
    """Return the bytes of state that an optimizer keeps for one parameter.

    Args:
        optimizer: the name of the optimizer.
        shape: the shape of the parameter, or of the shard that a process holds.
        size: the bytes of one of its numbers.
        is_hidden: whether it is a matrix that Muon updates.
    """
    return (_one_moment if is_hidden else STATES[optimizer])(shape, size)
