"""What a loss says of itself: the label that it leaves out, and its class weights. The self-check measures both."""

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
    """Return the label that the loss leaves out, and that labels are padded with."""
    named = [_declared(components, "ignore_index")]
    if components.loss_fn is None:
        of_pixels = _OF_PIXELS if _are_pixels(rows.fetch([0])[0]) else ()
        named += [getattr(components.configuration, name, None) for name in (*of_pixels, "ignore_index")]
    return next((n for n in named if isinstance(n, int)), IGNORE_INDEX)


def _are_pixels(row: Row) -> bool:
    labels = row.get("labels", row.get("label")) if isinstance(row, Mapping) else None
    return labels is not None and np.ndim(labels) > 1


def class_weights_of(components: Components) -> Tensor | None:
    """Return the class weights that the loss has, if it says so."""
    weights = _declared(components, "weight")
    return weights if isinstance(weights, Tensor) and weights.ndim == 1 else None


def _declared(components: Components, name: str) -> Any:
    """Return an attribute of the loss: the user's, or the only one among the modules that compute it."""
    loss_fn = components.loss_fn
    if isinstance(loss_fn, functools.partial):
        return loss_fn.keywords.get(name)
    if loss_fn is not None and hasattr(loss_fn, name):
        return getattr(loss_fn, name)
    owner = components.model if loss_fn is None else loss_fn
    modules = owner.modules() if isinstance(owner, nn.Module) else ()
    losses = [module for module in modules if isinstance(module, _LOSSES)]
    return getattr(losses[0], name) if len(losses) == 1 else None
