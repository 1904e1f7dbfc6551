"""The ignored label and the class weights that a loss declares. The self-check measures whether they are right.

A callback may change them during the run, so they are read at each count.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..data.dataset import Rows
from ..data.row import Row
from ..objective.item_counts import IGNORE_INDEX, Declared, ItemCounter
from .config import Components

_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss)
_OF_PIXELS = ("semantic_loss_ignore_index", "loss_ignore_index")  # in Transformers' configs


def ignore_index_of(components: Components, rows: Rows) -> int:
    """Return the label that the loss ignores, which is also the padding of labels."""
    config, is_own = components.configuration, components.loss_fn is None
    of_pixels = is_own and _are_pixels(rows.fetch([0])[0])
    return declared_ignore_index(components.model, components.loss_fn, config, of_pixels=of_pixels)


def declared_ignore_index(model: nn.Module, loss_fn: Any, config: Any, *, of_pixels: bool) -> int:
    """Return the label that a loss ignores; -100 if neither the loss nor the model declares one.

    Args:
        loss_fn: the user's loss; None for the model's own.
        config: the configuration of the model, or any object.
        of_pixels: whether labels are images.
    """
    named = [_declared(model, loss_fn, "ignore_index")]
    if loss_fn is None:
        named += [getattr(config, name, None) for name in (*(_OF_PIXELS if of_pixels else ()), "ignore_index")]
    return next((n for n in named if isinstance(n, int)), IGNORE_INDEX)


def _are_pixels(row: Row) -> bool:
    labels = row.get("labels", row.get("label")) if isinstance(row, Mapping) else None
    return labels is not None and np.ndim(labels) > 1


def class_weights_of(model: nn.Module, loss_fn: Any) -> Tensor | None:
    """Return the class weights that the loss declares, of shape (classes,), or None."""
    weights = _declared(model, loss_fn, "weight")
    return weights if isinstance(weights, Tensor) and weights.ndim == 1 else None


def counter_of(model: nn.Module, loss_fn: Any, ignore_index: int) -> ItemCounter:
    """Return the ways to count the items of a loss, by the ignored label and the class weights that it declares.

    Args:
        ignore_index: the label that is ignored if the loss declares none.
    """
    # A user's loss may replace the loss inside it. A model is large, and searched only once.
    source = _loss_inside(model) if loss_fn is None else loss_fn

    def declared() -> Declared:
        if source is None:
            return ignore_index, None
        ignored, weights = _declared(model, source, "ignore_index"), class_weights_of(model, source)
        return ignored if isinstance(ignored, int) else ignore_index, weights

    return ItemCounter(ignore_index, declared)


def _declared(model: nn.Module, loss_fn: Any, name: str) -> Any:
    """Return an attribute of `loss_fn` or, if it has none, of the only loss module inside `loss_fn` or the model."""
    if isinstance(loss_fn, functools.partial):
        return loss_fn.keywords.get(name)
    if loss_fn is not None and hasattr(loss_fn, name):
        return getattr(loss_fn, name)
    return getattr(_loss_inside(model if loss_fn is None else loss_fn), name, None)


def _loss_inside(owner: Any) -> nn.Module | None:
    """Return the only loss module inside a module; None if there is none, or several."""
    modules = owner.modules() if isinstance(owner, nn.Module) else ()
    losses = [module for module in modules if isinstance(module, _LOSSES)]
    return losses[0] if len(losses) == 1 else None
