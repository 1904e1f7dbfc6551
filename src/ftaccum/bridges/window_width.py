"""One width for all micro-batches of a window, for losses that padding changes."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import as_mapping, in_form_of, padded
from ..data.column_fills import ColumnFills, values_at_padding
from ..errors import SettingsError
from ..objective.item_counts import Batch, targets_of
from ..runtime.process_group import ProcessGroup
from ..training.declared import declared_ignore_index


def padding_of(model: nn.Module, loss_fn: Any, batch: Batch) -> dict[str, int]:
    """Return the padding of columns: the model's padding token, and the label that the loss ignores."""
    config: Any = getattr(model, "config", None) or SimpleNamespace()
    targets, pad_token_id = targets_of(batch), getattr(config, "pad_token_id", None)
    of_pixels = loss_fn is None and targets is not None and targets.ndim > 2
    ignore_index = declared_ignore_index(model, loss_fn, config, of_pixels=of_pixels)
    return {"input_ids": pad_token_id if isinstance(pad_token_id, int) else 0, "labels": ignore_index}


def at_one_width(batches: Sequence[Batch], fill: Mapping[str, int], process_group: ProcessGroup) -> list[Batch]:
    """Return batches padded to the width of the widest one of a window on any process. All processes call this.

    Args:
        batches: this process's batches.
        fill: the padding of columns, unless the batches show another one.

    Raises:
        DataError: on all processes, if the padding of a column is unknown.
        SettingsError: on all processes, if a batch is padded on the left, where more padding would move its tokens.
    """
    columns = [as_mapping(batch) for batch in batches]
    ids = [each["input_ids"] for each in columns if isinstance(each, Mapping) and "input_ids" in each]
    is_left = any(_is_padded_on_the_left(each, fill["input_ids"]) for each in columns if isinstance(each, Mapping))
    if process_group.any(is_left):
        raise SettingsError(
            [
                "Padding changes the loss of this model, so all rows of a window must have one length. But these rows "
                "are padded on the left. Set `tokenizer.padding_side = 'right'`."
            ]
        )
    width = max(process_group.gather(max((each.shape[-1] for each in ids), default=0)))
    fills = ColumnFills(fill, _seen_by_all(batches, process_group))
    wide = process_group.run_on_all(lambda: [padded(each, width, fills) for each in columns])
    return [in_form_of(batch, each) for batch, each in zip(batches, wide, strict=True)]


def _is_padded_on_the_left(batch: Mapping[str, Any], pad_token_id: int) -> bool:
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if mask is not None:
        return mask.ndim == 2 and not bool(torch.as_tensor(mask)[:, 0].all())
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return False
    return bool(((ids[:, 0] == pad_token_id) & (ids[:, -1] != pad_token_id)).any())


def _seen_by_all(batches: Sequence[Batch], process_group: ProcessGroup) -> dict[str, set[float]]:
    """Return the values that columns have at padding, on any process."""
    merged: dict[str, set[float]] = {}
    for seen in process_group.gather(values_at_padding(batches)):
        for name, values in seen.items():
            merged.setdefault(name, set()).update(values)
    return merged
