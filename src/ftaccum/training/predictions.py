"""The predictions of a model on the validation rows: read from its outputs, kept on the host, gathered and joined."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import find_labels

from ..errors import SettingsError, shown
from ..objective.item_counts import IGNORE_INDEX, Batch, targets_of, tensors_of
from ..objective.own_loss import LOSS
from ..planning.micro_batches import RowIndices
from ..runtime.adapters import base_of
from ..runtime.process_group import ProcessGroup

_PIECE = 2**24  # bytes that a process sends to the main process at a time
_INTEGERS = (np.int8, np.int16, np.int32)


@dataclass(frozen=True)
class HostArray:
    """A tensor that was copied to the host.

    Attributes:
        values: its numbers. Integers are stored in the smallest type that holds them.
        dtype: the type of the tensor, which `join` restores.
    """

    values: np.ndarray
    dtype: np.dtype


@dataclass(frozen=True)
class BatchPredictions:
    """The predictions and labels of one batch.

    Attributes:
        rows: positions of its rows in the validation rows.
        predictions, labels: HostArrays, or nested tuples, lists and dicts of them; labels are None for rows without.
    """

    rows: RowIndices
    predictions: Any
    labels: Any

    @property
    def n_bytes(self) -> int:
        known = [each for each in (self.predictions, self.labels) if each is not None]
        return sum(array.values.nbytes for array in _arrays(known))


def label_columns(model: nn.Module) -> tuple[str, ...]:
    """Return the columns that `Trainer` takes as the labels of a Transformers model; none for other models."""
    base = base_of(model)
    return tuple(find_labels(type(base))) if isinstance(base, PreTrainedModel) else ()


def labels_of(batch: Batch, columns: Sequence[str]) -> Any:
    """Return the labels of a batch as `Trainer` does: a tensor, a tuple for several columns, or None.

    Args:
        columns: the model's `label_columns`. If the batch lacks any of them, return its targets.
    """
    if not columns or not isinstance(batch, Mapping) or not all(isinstance(batch.get(c), Tensor) for c in columns):
        return targets_of(batch)
    labels = tuple(batch[column] for column in columns)
    return labels[0] if len(labels) == 1 else labels


def ignored_outputs(model: nn.Module) -> frozenset[str]:
    """Return the names of the outputs that are no predictions, such as `past_key_values`."""
    config = getattr(model, "config", None)
    return frozenset([LOSS, *getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])])


def named_outputs(outputs: Any, ignored: frozenset[str], loss_place: int | None) -> dict[str, Any]:
    """Return a model's outputs without its loss, by name. Outputs without names get their position as a name.

    Args:
        ignored: the names of outputs to leave out.
        loss_place: the position of the loss among outputs without names, if it is one of them.
    """
    if isinstance(outputs, Mapping):
        named = {str(name): value for name, value in outputs.items() if name not in ignored}
    elif isinstance(outputs, list | tuple):
        loss = getattr(outputs, LOSS, None)  # of a named tuple
        named = {str(n): value for n, value in enumerate(outputs) if n != loss_place and value is not loss}
    else:
        named = {"logits": outputs}
    return {name: recursively_apply(Tensor.detach, value) for name, value in named.items() if value is not None}


def without_numbers(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the outputs that are tensors or structures of them, without single numbers, caches and the like."""
    return {
        name: value
        for name, value in named.items()
        if not (isinstance(value, Tensor) and value.ndim == 0) and is_of_tensors(value)
    }


def is_of_tensors(value: Any) -> bool:
    """Return whether a value is a tensor, or a nested tuple, list or dict of at least one tensor."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return bool(value) and all(map(is_of_tensors, value))
    return isinstance(value, Tensor)


def unwrapped(named: Mapping[str, Any]) -> Any:
    """Return the outputs as `Trainer` does: the only one, or a tuple."""
    values = tuple(named.values())
    return values[0] if len(values) == 1 else values


def check_form(structure: Any, n_rows: int, what: str) -> None:
    """Raise SettingsError if a structure does not consist of tensors with a batch's rows as their first dimension.

    Args:
        what: what the structure is, for the message.
    """
    if not is_of_tensors(structure):
        raise SettingsError(
            [
                f"{what} must be a tensor, or a tuple, list or dict of tensors, but is {shown(structure)} instead. "
                "Return tensors with one entry for each row of the batch."
            ]
        )
    shapes = [tuple(tensor.shape) for tensor in tensors_of(structure)]
    if odd := [shape for shape in shapes if not shape or shape[0] != n_rows]:
        raise SettingsError(
            [
                f"{what} must have the rows of the batch as the first dimension, but a tensor for {n_rows} rows has "
                f"the shape {odd[0]} instead. Return one entry for each row from `preprocess_logits_for_metrics`, "
                "which gets the outputs of the model and the labels."
            ]
        )


def copy_to_host(tensor: Tensor) -> HostArray:
    """Copy a tensor to the host.

    Always copy: a view would keep all of the logits that it was cut from, and a model may reuse its outputs' memory.
    """
    tensor = tensor.detach()
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    values = tensor.to("cpu", copy=True).numpy()
    return HostArray(_narrowed(values), values.dtype)


def _narrowed(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "iu" or not values.size:
        return values
    lowest, highest = values.min(), values.max()
    fitting = (t for t in _INTEGERS if np.iinfo(t).min <= lowest and highest <= np.iinfo(t).max)
    narrow = np.dtype(next(fitting, values.dtype))
    return values.astype(narrow) if narrow.itemsize < values.dtype.itemsize else values


def gather_on_main(batches: Sequence[BatchPredictions], process_group: ProcessGroup) -> list[BatchPredictions]:
    """Return the batches of all processes on the main process; an empty list on the others.

    Processes send pieces of at least 16 MiB, so that sending takes little memory besides the predictions.
    """
    if process_group.is_single:
        return list(batches)
    pieces = _pieces(batches)
    gathered: list[BatchPredictions] = []
    while process_group.any((piece := next(pieces, None)) is not None):
        for received in process_group.gather_on_main(piece or []):
            gathered += received
    return gathered


def _pieces(batches: Sequence[BatchPredictions]) -> Iterator[list[BatchPredictions]]:
    piece: list[BatchPredictions] = []
    size = 0
    for batch in batches:
        piece.append(batch)
        size += batch.n_bytes
        if size >= _PIECE:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def join(structures: Sequence[Any], rows: Sequence[RowIndices]) -> Any:
    """Return the arrays of all batches as one, with the rows in their original order.

    Unequal widths are padded with -100, as Transformers' `Trainer` does.

    Args:
        structures: the predictions or the labels of each batch, all with the same structure.
        rows: the positions of each batch's rows; together each position from 0 on, once.

    Raises:
        SettingsError: if the structures or the numbers of dimensions of batches differ.
    """
    arrays = [_arrays(structure) for structure in structures]
    shapes = {tuple(array.values.ndim for array in each) for each in arrays}
    if len(shapes) > 1:
        raise SettingsError(
            [
                "`compute_metrics` needs predictions of the same form from every batch, but their tensors have "
                f"{' and '.join(str(shape) for shape in sorted(shapes))} dimensions in different batches. Check "
                "`preprocess_logits_for_metrics`: `squeeze`, for example, also removes the dimension of a single row."
            ]
        )
    joined = iter([_joined(each, rows) for each in zip(*arrays, strict=True)])
    return recursively_apply(lambda _: next(joined), structures[0], test_type=_is_array)


def concatenate(arrays: Sequence[HostArray]) -> np.ndarray:
    """Return arrays of one dimension as one."""
    return np.concatenate([array.values for array in arrays]).astype(arrays[0].dtype)


def _joined(arrays: Sequence[HostArray], rows: Sequence[RowIndices]) -> np.ndarray:
    widths = [array.values.shape[1:] for array in arrays]
    widest = tuple(map(max, zip(*widths, strict=True)))
    dtype = np.result_type(*{array.dtype for array in arrays})
    if dtype.kind == "u" and any(width != widest for width in widths):
        dtype = np.result_type(dtype, np.int8)  # -100 fits in no unsigned type
    filled = np.full((sum(map(len, rows)), *widest), 0 if dtype.kind == "u" else IGNORE_INDEX, dtype)
    for array, places, width in zip(arrays, rows, widths, strict=True):
        block: Any = (list(places), *map(slice, width))
        filled[block] = array.values
    return filled


def _arrays(structure: Any) -> list[HostArray]:
    if isinstance(structure, Mapping):
        structure = list(structure.values())
    if isinstance(structure, list | tuple):
        return [array for part in structure for array in _arrays(part)]
    return [structure]


def _is_array(value: Any) -> bool:
    return isinstance(value, HostArray)
