"""Turn labels into numbers that a loss takes: strings, booleans and multi-hot vectors."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .dataset import Rows

LABELS = ("labels", "label", "label_ids")

_Convert = Callable[[Any, str], Any]  # takes a label and the name of its row, returns the label as a number


def settle_labels(rows: Rows, config: Any, *, own_loss: bool) -> Rows:
    """Return the rows with labels that are numbers, of the type that the model's own loss takes.

    Strings become numbers by the model's `label2id`. For the model's own loss, booleans become class numbers, and
    multi-hot vectors become floats if `problem_type` is "multi_label_classification".

    Args:
        own_loss: whether the model computes the loss. A `loss_fn` gets labels as they are, except for strings.

    Raises:
        DataError: if a label is not in `label2id`. It names the row.
    """
    row = rows.fetch([0])[0]
    name = next((name for name in LABELS if isinstance(row, Mapping) and name in row), None)
    convert = None if name is None else _converter(row[name], config, own_loss)
    return rows if name is None or convert is None else rows.with_column(name, convert)


def label_id(label: Any, name: str, config: Any) -> Any:
    """Return the number of a label that is a string, the numbers of a list of labels, and any other label as it is.

    Args:
        name: the name of the row, to begin a message with.

    Raises:
        DataError: if the label is not in the config's `label2id`.
    """
    if isinstance(label, list | tuple):
        return [label_id(each, name, config) for each in label]
    if not isinstance(label, str):
        return label
    # Transformers fills in placeholders for the one of the two that is not given.
    numbers = {name: n for n, name in (getattr(config, "id2label", None) or {}).items()}
    known = getattr(config, "label2id", None) or numbers
    if label not in known and label in numbers:
        return numbers[label]
    if label not in known:
        raise DataError(
            f"{name} has the label {label!r}, but the model's config.label2id knows {sorted(known)}. Set label2id and "
            "id2label when loading the model, or give the labels as numbers."
        )
    return known[label]


def _converter(label: Any, config: Any, own_loss: bool) -> _Convert | None:
    """Return a function that converts labels like this one; None if they stay as they are."""
    first = label[0] if isinstance(label, list | tuple) and label else label
    if isinstance(first, str):
        return partial(label_id, config=config)
    if not own_loss or isinstance(first, list | tuple | str) or first is None:
        return None
    kind = _kind(label)
    if getattr(config, "problem_type", None) == "multi_label_classification" and np.ndim(label) and kind in "biu":
        return lambda label, _: _as_floats(label)
    if kind == "b" and not np.ndim(label):
        return lambda label, _: int(label)
    return None


def _kind(label: Any) -> str:
    if isinstance(label, Tensor):
        return "b" if label.dtype == torch.bool else "f" if label.is_floating_point() else "i"
    return np.asarray(label).dtype.kind


def _as_floats(label: Any) -> Any:
    return label.float() if isinstance(label, Tensor) else [float(each) for each in label]
