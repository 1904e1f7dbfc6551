"""The rows, the objective and the loaders, built from the user's data, model and loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from accelerate import Accelerator

from ..data.classes import describe_draws, row_classes
from ..data.dataset import Rows
from ..data.iterable import Stream
from ..data.loader import Loader
from ..data.probe_rows import labelled_positions, sample_of
from ..data.tokenize import most_tokens
from ..data.validation import check_sample
from ..data.value_ranges import ValueRanges
from ..errors import DataError, SettingsError, refuse
from ..objective.cross_entropy import CrossEntropy
from ..objective.item_counts import tensors_of
from ..objective.loss_scale import find_divisor
from ..objective.model_forward import LossFn
from ..objective.objective import Objective
from ..objective.window_forward import WindowForward
from .build_collator import build_padding, build_row_collator, check_padded_labels, measure_documents, packed_collator
from .build_objective import build_forward, build_objective
from .build_ranges import find_ranges
from .build_rows import build_rows
from .config import Components, RunConfig
from .declared import ignore_index_of
from .metrics import has_labels
from .token_cap import check_token_cap, longest_width


@dataclass(frozen=True)
class TrainingData:
    """The data that a run trains and validates on.

    Attributes:
        train_rows: the training rows.
        val_rows: the validation rows, if any.
        objective: the loss and how to count its items.
        train: loads micro-batches of `train_rows`.
        val: loads micro-batches of `val_rows`, if there are any.
        ignore_index: the label that the loss ignores.
        synthetic: whether the rows are random tokens.
        loss_divisor: the whole number by which `loss_fn` is smaller than the model's own loss, if there is one.
        text_notes: lines for the banner about raw text.
        text_columns: the columns that texts are read from; empty if the rows are no raw text.
        loss_fn: the function that computes the loss: the user's, or the one that `class_weights` and `label_smoothing`
            define; None for the model's own.
        classes: the class of each training row, if `sampler` is "balanced".
        packed: whether a row may hold several documents.
        longest: the width of a batch of the longest training row, if `max_tokens` is "auto".
    """

    train_rows: Rows
    val_rows: Rows | None
    objective: Objective
    train: Loader
    val: Loader | None
    ignore_index: int
    synthetic: bool
    loss_divisor: int | None = None
    text_notes: tuple[str, ...] = ()
    text_columns: tuple[str, ...] = ()
    loss_fn: LossFn | None = None
    classes: tuple[int, ...] = ()
    packed: bool = False
    longest: int | None = None

    def notes(self) -> list[str]:
        """Return the banner's lines about the data and the loss."""
        objective = self.objective
        widths = ", rows padded to one length per update" if objective.padding_sensitive else ""
        notes = [*self.text_notes, f"Loss: {objective.report.describes}{widths}"]
        notes += self.loss_fn.describe() if isinstance(self.loss_fn, CrossEntropy) else []
        notes += [describe_draws(self.classes)] if self.classes else []
        if self.packed:
            notes.append("Rows: packed; `position_ids` keep their documents apart")
        if self.synthetic:
            notes.insert(0, "Data: SYNTHETIC random tokens, because `train_data` is None; losses mean nothing")
        return notes


def build_data(config: RunConfig, accelerator: Accelerator, stream: Stream | None) -> TrainingData:
    """Convert the data to rows, check a sample of them, and measure how the loss is counted.

    Args:
        config: the configuration; its model must be whole, and on the device where it is to be measured.
        accelerator: the accelerator of the run.
        stream: the training data, if they are a stream.

    Raises:
        DataError: if the data cannot be trained on.
    """
    components, runtime = config.components, config.runtime
    given = build_rows(config, accelerator, stream)
    rows, val_rows = given.train, given.val
    ignore_index = ignore_index_of(components, rows)
    padding, val_padding = build_padding(components, rows, val_rows, ignore_index, _longest(config, rows))
    row_collator, val_collator = (build_row_collator(components, each) for each in (padding, val_padding))
    for each, collator in zip(given.all, (row_collator, val_collator), strict=False):
        check_token_cap(config, each, row_collator, is_stream=stream is not None)
        collator.find_draws(each)
    batch = check_sample(rows, row_collator, ValueRanges.of_tokens(components.model))
    forward = build_forward(config, batch, rows)
    ranges = find_ranges(components, forward, rows, row_collator, ignore_index)
    for each in given.all if components.data_collator is None else ():  # a user's collator may change the numbers
        ranges.check_all(each)
    check_sample(rows, row_collator, ranges)
    if val_rows is not None:
        _check_validation(components, batch, check_sample(val_rows, val_collator, ranges))
    labelled = labelled_positions(rows, row_collator, ignore_index)
    sample = sample_of(rows, row_collator, labelled, ignore_index, components.label_kind)
    for group in sample.rare:
        ranges.check(group.together, rows, group.positions)
        labelled += group.positions
    forward, objective = build_objective(
        config, accelerator, forward, rows, row_collator, sample, labelled, ignore_index
    )
    if padding is not None and val_padding is not None:
        check_padded_labels(components, objective, rows, padding, labelled)
        padding.documents = val_padding.documents = measure_documents(config, objective, rows, padding, labelled)
        batch = check_sample(rows, row_collator, ranges)
    _check_padding(components, objective)
    pins = _pins_memory(accelerator, batch)
    load = partial(Loader, objective=objective, ranges=ranges, num_workers=runtime.num_workers, pin_memory=pins)
    if runtime.padding_free:
        row_collator = packed_collator(components, objective, rows, row_collator, labelled, ignore_index)
    return TrainingData(
        rows,
        val_rows,
        objective,
        load(rows, row_collator, dummy_candidates=labelled),
        None if val_rows is None else load(val_rows, val_collator),
        ignore_index,
        synthetic=components.train_data is None,
        loss_divisor=None if components.loss_fn is None else find_divisor(components.model, objective, sample),
        text_notes=given.notes,
        text_columns=given.text_columns,
        loss_fn=None if isinstance(forward, WindowForward) else forward.loss_fn,
        classes=row_classes(rows, ignore_index) if config.recipe.sampler == "balanced" else (),
        packed=padding is not None and padding.documents.kept_apart is True and "attention_mask" not in batch,
        longest=longest_width(runtime, rows, row_collator),
    )


def _pins_memory(accelerator: Accelerator, batch: Any) -> bool:
    """Return whether batches like this one are copied to the device from pinned memory."""
    return accelerator.device.type == "cuda" and all(t.device.type == "cpu" for t in tensors_of(batch))


def _longest(config: RunConfig, rows: Rows) -> int | None:
    """Return the length of the longest row for a compiled model, whose batches have bucketed widths; else None."""
    if not config.runtime.compile:
        return None
    components = config.components
    return rows.longest(most_tokens(components.tokenizer, components.configuration, components.model))


def _check_validation(components: Components, train: Any, val: Any) -> None:
    if isinstance(train, Mapping) and isinstance(val, Mapping) and train.keys() - val.keys():
        raise DataError(
            f"`val_data` lacks the columns {sorted(train.keys() - val.keys())} that `train_data` has. "
            "Give it the same columns as `train_data`."
        )
    if components.compute_metrics is not None and not has_labels(components.compute_metrics, components.model, val):
        columns = f", only {', '.join(map(repr, val))}" if isinstance(val, Mapping) else ""
        raise SettingsError(
            [
                f"`compute_metrics` compares with `labels`, but the validation rows have none{columns}. Name the "
                "column to compare with `labels`, or leave `compute_metrics` out."
            ]
        )


def _check_padding(components: Components, objective: Objective) -> None:
    """Raise SettingsError if the tokenizer does not pad as the model expects, which changes the loss."""
    if not objective.padding_sensitive:
        return
    name, tokenizer = type(components.model).__name__, components.tokenizer
    ours = getattr(tokenizer, "pad_token_id", None)
    wanted = getattr(getattr(components.model, "config", None), "pad_token_id", None)
    faults = {
        f"`tokenizer.padding_side` is 'left', and padding on the left changes the loss of {name}. Set "
        "`tokenizer.padding_side = 'right'`.": components.padding_side == "left",
        f"`tokenizer.pad_token_id` is {ours}, but `model.config.pad_token_id` is {wanted}, so {name} treats padding "
        "as text. Set `model.config.pad_token_id = tokenizer.pad_token_id`.": (
            ours is not None and wanted is not None and ours != wanted
        ),
    }
    refuse([sentence for sentence, holds in faults.items() if holds])
