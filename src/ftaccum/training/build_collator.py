"""The collators of a run, chosen by looking at the rows and at what the model does with them."""

import copy
import itertools
from dataclasses import replace

import torch
from torch import Tensor

from ..data.collator import RowCollator
from ..data.columns import Along, ColumnRules, Columns, Size
from ..data.dataset import Rows
from ..data.documents import Documents, starts_of
from ..data.packing import PackingCollator
from ..data.padding import PaddingCollator
from ..data.probe_rows import sample_positions
from ..data.row import Row
from ..data.scan import look_at_columns
from ..errors import DataError, SettingsError
from ..objective.model_forward import accepted_arguments
from ..objective.objective import Objective
from ..objective.packing_check import difference_of_packing
from ..objective.probe import EXPLAINED
from .config import Components, RunConfig

_FEW = 4  # rows to measure how the model treats packed rows, and the loss padded labels


def build_padding(
    components: Components, rows: Rows, val_rows: Rows | None, ignore_index: int, bucketed_up_to: int | None
) -> tuple[PaddingCollator | None, PaddingCollator | None]:
    """Inspect the columns of the rows, and return the padding collators for training and validation rows.

    Both are None if the user gives a collator.

    Raises:
        DataError: if the columns of a row do not match those of other rows. The message names the row.
    """
    if components.data_collator is not None:
        return None, None
    accepted = accepted_arguments(components.model)
    config = getattr(components.model, "config", None)
    rules = ColumnRules(
        None if accepted is None else frozenset(accepted),
        keep_all=components.loss_fn is not None or components.count_items is not None,
        own_targets=getattr(config, "is_encoder_decoder", None),
    )
    padding = PaddingCollator(
        rules,
        pad_token_id=components.pad_token_id,
        padding_side=components.padding_side,
        ignore_index=ignore_index,
        bucketed_up_to=bucketed_up_to,
    )
    padding.columns = look_at_columns(rows, rules, sample_positions(rows))
    if val_rows is None or padding.columns is None:
        return padding, padding
    validation = copy.copy(padding)  # validation rows may have more columns, such as a mask
    of_val = look_at_columns(val_rows, rules, sample_positions(val_rows), like=padding.columns)
    more = () if of_val is None else of_val.keys.keys() - padding.columns.keys.keys() - rules.names
    padding.columns = replace(padding.columns, ignored=frozenset(more))
    validation.columns = padding.columns if of_val is None else of_val
    return padding, validation


def build_row_collator(components: Components, padding: PaddingCollator | None) -> RowCollator:
    """Return a collator of rows by position, which pads them or calls the user's collator."""
    if padding is not None:
        return RowCollator(padding)
    assert components.data_collator is not None, "without a collator, rows are padded"
    return RowCollator(components.data_collator, accepted_arguments(components.model))


def measure_documents(
    config: RunConfig, objective: Objective, rows: Rows, padding: PaddingCollator, labelled: list[int]
) -> Documents:
    """Measure whether the model keeps the documents of a packed row from attending to each other.

    Compare the loss of documents in rows of their own with the loss of the same documents, concatenated. The rows of
    the data need not be packed for that. At most two concatenated rows run together.

    Args:
        labelled: positions of rows with labels that count.
    """
    model, rows_at_once = config.components.model, 1 if config.runtime.batch_size == 1 else 2
    columns, along_tokens = padding.columns, (Along.TOKENS,)
    if columns is None or {columns.sizes.get(name) for name in ("input_ids", "position_ids")} != {along_tokens}:
        return Documents()
    if columns.sizes.get("labels", along_tokens) != along_tokens:
        return Documents(kept_apart=False, problem="it does not have one label per token")
    few = _few_labelled(labelled)
    documents = [document for row in rows.fetch(few) for document in _documents(row, columns)]
    as_documents, as_packed = copy.copy(padding), copy.copy(padding)
    as_documents.columns = as_packed.columns = columns = columns.without("attention_mask")
    as_documents.left = False  # with padding on the left, the first label would be predicted from padding
    as_packed.documents = Documents(shifted=objective.shifts)
    packed = [_joined(documents[n::rows_at_once], columns) for n in range(rows_at_once)]
    off = difference_of_packing(model, objective, as_documents(documents), as_packed(packed))
    if off <= EXPLAINED:
        return Documents(kept_apart=True, shifted=objective.shifts)
    name = type(model).__name__
    problem = f"{name} lets the documents of a row attend to each other, which changes their loss by {100 * off:.2g}%"
    return Documents(kept_apart=False, problem=problem, shifted=objective.shifts)


def _documents(row: Row, columns: Columns) -> list[Row]:
    """Return each document of a row as a separate row, without padding and masks."""
    tensors = {name: column[0] for name, column in columns.tensors([row]).items()}
    tokens = tensors.pop("attention_mask", torch.ones_like(tensors["input_ids"]))
    used = tokens.nonzero().flatten() if tokens.ndim == 1 else torch.arange(len(tensors["input_ids"]))
    starts = starts_of(tensors["position_ids"][used]).nonzero().flatten().tolist()
    parts = [used[n:m] for n, m in itertools.pairwise([*starts, len(used)])]
    return [
        {columns.keys[name]: _at(tensor, columns.sizes[name], part) for name, tensor in tensors.items()}
        for part in parts
    ]


def _at(tensor: Tensor, sizes: tuple[Size, ...], tokens: Tensor) -> Tensor:
    """Return the part of a row's column that belongs to some of its tokens."""
    for dim, size in enumerate(sizes):
        if size is Along.TOKENS:
            tensor = tensor.index_select(dim, tokens)
    return tensor


def _joined(documents: list[Row], columns: Columns) -> Row:
    """Return the documents, concatenated to one packed row."""
    joined = dict(documents[0])
    for name, sizes in columns.sizes.items():
        if Along.TOKENS in sizes:
            key = columns.keys[name]
            joined[key] = torch.cat([document[key] for document in documents], dim=sizes.index(Along.TOKENS))
    return joined


def check_padded_labels(
    components: Components, objective: Objective, rows: Rows, padding: PaddingCollator, labelled: list[int]
) -> None:
    """Check that the loss ignores the padding of labels that run along the tokens.

    Raises:
        DataError: if it counts padded labels.
    """
    columns = padding.columns
    if columns is None or Along.TOKENS not in columns.sizes.get("labels", ()):
        return
    few = rows.fetch(labelled[:_FEW])
    other = copy.copy(padding)
    other.ignore_index = padding.ignore_index + 117
    one, another = padding(few), other(few)
    labels = one["labels"]
    if torch.equal(labels, another["labels"]):  # rows of one length
        return
    if labels.is_floating_point():
        counted = difference_of_packing(components.model, objective, one, another) > EXPLAINED
    else:
        counted = "elements" in objective.report.ways.values()
    if counted:
        raise DataError(
            f"`{rows.argument}` has labels for each token. The labels of short rows are padded with "
            f"{padding.ignore_index}, which this loss does not ignore. Pass a `loss_fn` that ignores positions where "
            "`attention_mask` is 0, or give rows of equal length."
        )


def packed_collator(
    components: Components,
    objective: Objective,
    rows: Rows,
    padded: RowCollator,
    labelled: list[int],
    ignore_index: int,
) -> RowCollator:
    """Return a collator that concatenates rows, after measuring that the model keeps them apart.

    Raises:
        SettingsError: if the model does not keep them apart, or cannot be given rows without padding.
    """
    accepted = accepted_arguments(components.model)
    unfit = {
        "a `data_collator` is given, which pads": components.data_collator is not None,
        "it is not a causal language model (labels are not predicted from the previous token)": not objective.shifts,
        "its `forward` does not accept `position_ids`": "position_ids" not in (accepted or ()),
    }
    for reason, holds in unfit.items():
        if holds:
            raise SettingsError(
                [
                    f"`padding_free` is True, but {type(components.model).__name__} cannot do without padding: "
                    f"{reason}. Leave `padding_free` out to pad rows to the longest of their micro-batch."
                ]
            )
    packed = RowCollator(PackingCollator(ignore_index), accepted)
    few = _few_labelled(labelled)
    off = difference_of_packing(components.model, objective, padded(rows, few), packed(rows, few))
    if not off <= EXPLAINED:
        raise SettingsError(
            [
                f"`padding_free` is True, but {type(components.model).__name__} lets concatenated rows attend "
                f"to each other, which changes their loss by {100 * off:.2g}%. Leave `padding_free` out, or load "
                "the model with another `attn_implementation` ('sdpa', 'flash_attention_2')."
            ]
        )
    return packed


def _few_labelled(labelled: list[int]) -> list[int]:
    """Return a few labelled rows, repeated if there are too few: a single row has no other row to attend to."""
    return (labelled * _FEW)[:_FEW]
