"""The inputs of a loss over a window, in one type and shape. Anything else raises a `DataError`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from .normalizer import widened


def column(batch: Mapping[str, Any], name: str, argument: str, n_rows: int) -> Tensor:
    """Return a column as a tensor of shape (rows,).

    Args:
        argument: the argument of the loss that names the column.
    """
    if not isinstance(batch, Mapping):
        raise DataError(
            f"The loss reads the column {name!r} of a dict, but the batch is {_kind(batch)}. Give rows as dicts with "
            "named columns."
        )
    if name not in batch:
        raise DataError(
            f"The loss reads the column {name!r}, but the batch has only {sorted(batch)}. Add the column to the rows, "
            f"or name another with `{argument}`."
        )
    values = batch[name]
    if not isinstance(values, Tensor) or values.shape not in ((n_rows,), (n_rows, 1)):
        raise DataError(
            f"The column {name!r} (`{argument}`) must be a tensor of shape ({n_rows},), but is {_kind(values)}. Give "
            "each row one number."
        )
    return values.reshape(n_rows)


def equal_ids(batch: Mapping[str, Any], name: str, argument: str, n_rows: int) -> Tensor:
    """Return which rows have equal ids, of shape (rows, rows)."""
    ids_N = column(batch, name, argument, n_rows)
    if ids_N.is_floating_point():
        raise DataError(
            f"The column {name!r} (`{argument}`) must have integers, but is {_kind(ids_N)}. Number the groups."
        )
    return ids_N[:, None] == ids_N


def scores(inputs: Tensor | Mapping[str, Tensor], name: str) -> Tensor:
    """Return the scores in at least float32, of shape (rows,)."""
    given = _named(inputs, name) if isinstance(inputs, Mapping) else inputs
    if not _is_float(given) or not given.numel() or given.shape not in ((len(given),), (len(given), 1)):
        raise DataError(
            f"The scores must be a floating-point tensor of shape (rows,) or (rows, 1), but are {_kind(given)}. Return "
            "one score per row from `loss_inputs`, or load a model with one output (`num_labels=1`)."
        )
    return widened(given.reshape(-1))


def embeddings(inputs: Mapping[str, Tensor], names: Sequence[str], several: str | None = None) -> list[Tensor]:
    """Return embeddings of shape (rows, dim), all in the widest of their types, which is float32 or float64.

    Args:
        several: a name that may be missing. Its tensor may have the shape (rows, n, dim), too.
    """
    if not isinstance(inputs, Mapping):
        raise DataError(
            f"The loss needs a dict with {' and '.join(map(repr, names))}, but `inputs` is {_kind(inputs)}. Return "
            "such a dict from `loss_inputs`."
        )
    found = {name: _named(inputs, name) for name in names}
    if several is not None and several in inputs:
        found[several] = inputs[several]
    rows_and_dim = _shape(found[names[0]])
    for name, x in found.items():
        shape = _shape(x)
        without_n = shape[:1] + shape[2:] if name == several and len(shape) == 3 else shape
        if not _is_float(x) or 0 in shape or len(without_n) != 2 or without_n != rows_and_dim:
            of_first = "(rows, dim)" if name == names[0] else f"{rows_and_dim}, as {names[0]!r}"
            or_more = " or (rows, n, dim)" if name == several else ""
            raise DataError(
                f"{name!r} must be a floating-point tensor of shape {of_first}{or_more}, but is {_kind(x)}. Return one "
                "embedding per row from `loss_inputs`."
            )
    dtype = torch.float32
    for x in found.values():
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in found.values()]


def _named(inputs: Mapping[str, Tensor], name: str) -> Any:
    if name not in inputs:
        raise DataError(
            f"The loss reads {name!r}, but the inputs are {sorted(inputs)}. Return it from `loss_inputs`, or give the "
            "loss another name."
        )
    return inputs[name]


def _is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 0


def _shape(x: object) -> tuple[int, ...]:
    return tuple(x.shape) if isinstance(x, Tensor) else ()


def _kind(x: object) -> str:
    """Describe an object of the wrong shape or type."""
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}"
    return f"{str(x.dtype).removeprefix('torch.')} of shape {_shape(x)}"
