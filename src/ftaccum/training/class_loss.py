"""The loss that `class_weights` and `label_smoothing` make of a model's own cross entropy."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..data.classes import count_labels
from ..data.collator import RowCollator
from ..data.dataset import Rows
from ..errors import SettingsError, shown
from ..objective.batch_changes import fresh_batch_for
from ..objective.cross_entropy import CrossEntropy
from ..objective.item_counts import Batch, targets_of
from ..objective.model_forward import ModelForward
from ..objective.own_cross_entropy import own_cross_entropy
from ..runtime.model_traits import output_embeddings
from ..runtime.model_wrapper import model_to_save
from ..runtime.state_guards import inspection_mode
from ..settings.recipe import Recipe
from .config import Components

_INSTEAD = "Leave it out, or put it into a `loss_fn`."


def build_class_loss(
    components: Components,
    recipe: Recipe,
    forward: ModelForward,
    rows: Rows,
    row_collator: RowCollator,
    batch: Batch,
    ignore_index: int,
) -> CrossEntropy | None:
    """Return the loss to train on instead of the model's own; None without `class_weights` and `label_smoothing`.

    Args:
        forward: the forward pass with the model's own loss.
        rows: the training rows. "balanced" counts their labels.
        batch: a few labelled rows, on the host.
        ignore_index: the label that the model's own loss ignores.

    Raises:
        SettingsError: if the model's own loss is not the cross entropy of its logits and labels, if its labels are not
            classes that can be weighted, or if there is not one weight per class.
    """
    model, smoothing = components.model, recipe.label_smoothing
    if not (recipe.class_weights or smoothing):
        return None
    reason = _unfit_labels(model, batch)
    plain = None if reason else own_cross_entropy(model, forward, batch, ignore_index)
    if plain is None:
        name = "class_weights" if recipe.class_weights else "label_smoothing"
        reason = reason or (
            f"the loss of {type(model).__name__} is not the mean cross entropy of its logits and labels. It is another "
            "loss, weights them itself, or adds terms"
        )
        raise SettingsError([f"`{name}` is {shown(getattr(recipe, name))}, but {reason}. {_INSTEAD}"])
    if not recipe.class_weights:
        return replace(plain, label_smoothing=smoothing)
    if plain.shifted or output_embeddings(model_to_save(model)) is not None:
        raise SettingsError(
            [
                f"`class_weights` is {shown(recipe.class_weights)}, but {type(model).__name__} predicts the tokens of "
                f"a vocabulary, not classes. {_INSTEAD}"
            ]
        )
    with inspection_mode(model):
        n_classes = forward.n_classes(model, fresh_batch_for(model, batch))
    assert n_classes is not None, "logits with the shape of the labels have given the loss"
    if recipe.class_weights == "balanced":
        weight = _balanced(rows, row_collator, n_classes, ignore_index, are_collated=bool(components.data_collator))
    else:
        weight = _of_list(recipe.class_weights, n_classes)
    return replace(plain, label_smoothing=smoothing, weight=weight)


def _unfit_labels(model: Any, batch: Batch) -> str | None:
    """Return why the labels of a batch cannot be weighted or smoothed; None if they are integers."""
    labels, ids = targets_of(batch), batch.get("input_ids") if isinstance(batch, Mapping) else None
    if labels is None:
        return f"the rows have no `labels`, only {sorted(map(str, batch))}, so the loss has no classes"
    if getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification":
        return "the model's `problem_type` is 'multi_label_classification', whose classes are independent of each other"
    if labels.is_floating_point():
        return "the labels are floats, as for regression or several classes per row"
    if isinstance(ids, Tensor) and ids.ndim == 3:
        return "each row has choices of its own (multiple choice), which are no classes"
    return None


def _balanced(
    rows: Rows, row_collator: RowCollator, n_classes: int, ignore_index: int, *, are_collated: bool
) -> Tensor:
    """Return n / (classes × n_c) for n labels, n_c of them of class c, as scikit-learn's `compute_class_weight`.

    Only classes with labels count as classes. Others, which a validation row may have, get the weight 1.
    """
    counts = count_labels(rows, row_collator, are_collated=are_collated)
    of_class = torch.tensor([0 if c == ignore_index else counts[c] for c in range(n_classes)], dtype=torch.float64)
    mean = of_class.sum() / (of_class > 0).sum()
    return torch.where(of_class > 0, mean / of_class, 1.0)


def _of_list(weights: Any, n_classes: int) -> Tensor:
    if len(weights) != n_classes:
        raise SettingsError(
            [
                f"`class_weights` has {len(weights)} numbers, but the model has {n_classes} classes. Give one number "
                "per class, in the order of the class numbers."
            ]
        )
    return torch.tensor(weights, dtype=torch.float64)
