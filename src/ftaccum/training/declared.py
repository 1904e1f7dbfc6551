"""The ignored label and the class weights that a loss declares. The self-check measures whether they are right."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..data.dataset import Rows
from ..data.row import Row
from ..objective.item_counts import IGNORE_INDEX
from .config import Components

_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss)
_OF_PIXELS = ("semantic_loss_ignore_index", "loss_ignore_index")  # in Transformers' configs


def ignore_index_of(components: Components, rows: Rows) -> int:
    """Return the label that the loss ignores, which is also the padding of labels."""
    named = [_declared(components, "ignore_index")]
    if components.loss_fn is None:
        of_pixels = _OF_PIXELS if _are_pixels(rows.fetch([0])[0]) else ()
        named += [getattr(components.configuration, name, None) for name in (*of_pixels, "ignore_index")]
    return next((n for n in named if isinstance(n, int)), IGNORE_INDEX)


def _are_pixels(row: Row) -> bool:
    labels = row.get("labels", row.get("label")) if isinstance(row, Mapping) else None
    return labels is not None and np.ndim(labels) > 1


def class_weights_of(components: Components) -> Tensor | None:
    """Return the class weights that the loss declares, of shape (classes,), or None."""
    weights = _declared(components, "weight")
    return weights if isinstance(weights, Tensor) and weights.ndim == 1 else None


def _declared(components: Components, name: str) -> Any:
    """Return an attribute of `loss_fn` or, if it has none, of the only loss module inside `loss_fn` or the model."""
    loss_fn = components.loss_fn
    if isinstance(loss_fn, functools.partial):
        return loss_fn.keywords.get(name)
    if loss_fn is not None and hasattr(loss_fn, name):
        return getattr(loss_fn, name)
    owner = components.model if loss_fn is None else loss_fn
    modules = owner.modules() if isinstance(owner, nn.Module) else ()
    losses = [module for module in modules if isinstance(module, _LOSSES)]
    return getattr(losses[0], name) if len(losses) == 1 else None
