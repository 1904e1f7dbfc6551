"""The labels of rare rows on a few common rows, which take fewer tokens than the rare rows to measure a loss on."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .item_counts import TOKEN_COLUMNS, Batch, are_per_token
from .sample import Sample


def with_rare_labels(sample: Sample, ignore_index: int) -> list[Batch] | None:
    """Return copies of the four common rows that together have all labels of the rare rows.

    The first row keeps its labels in each copy, and the others get rare ones. A loss that ignores or weights rare
    labels is then no mean over all labels of a copy: if all rows had them in equal shares, it would look like one. The
    first token of a row gets none, because a loss of next tokens reads no label there.

    Args:
        ignore_index: the label that the loss is known to ignore, which padding keeps.

    Returns:
        None if that shows less than the rare rows: if these have other columns that a loss may depend on, or if rows
        have no label for each token, or cannot be split.
    """
    together, rare = sample.together, [group.together for group in sample.rare]
    labels_BL = together.get("labels") if isinstance(together, Mapping) else None
    if not are_per_token(labels_BL) or sample.cut is None:
        return None
    if any(batch.keys() - {*TOKEN_COLUMNS, "labels"} for batch in rare):
        return None
    values = torch.cat([labels_BL.flatten(), *(batch["labels"].flatten() for batch in rare)]).unique()
    values = values[(values != ignore_index) & ~torch.isin(values, labels_BL)]
    places = _places(together, labels_BL, ignore_index)
    width = labels_BL.shape[1]
    places = places[(places >= width) & (places % width > 0)]
    if len(values) and not len(places):  # a single row, or rows of single tokens
        return None
    batches: list[Batch] = []
    for some in values.split(len(places)) if len(values) else ():
        labels = torch.full_like(labels_BL, ignore_index)
        labels[0] = labels_BL[0]
        labels.view(-1)[places] = some.repeat(-(-len(places) // len(some)))[: len(places)]
        batches.append({**together, "labels": labels})
    return batches


def _places(batch: Batch, labels_BL: Tensor, ignore_index: int) -> Tensor:
    """Return the places of tokens in the flattened labels; if labels are of another sequence, those of its labels."""
    mask = batch.get("attention_mask")
    is_of_labels = isinstance(mask, Tensor) and mask.shape == labels_BL.shape
    return (mask.bool() if is_of_labels else labels_BL != ignore_index).flatten().nonzero()[:, 0]
