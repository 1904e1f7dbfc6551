"""From what the user brought along to rows, an objective and loaders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from ..data.collator import RowCollator
from ..data.convert import as_rows, synthetic_rows
from ..data.dataset import Rows
from ..data.iterable import Stream, StreamRows
from ..data.loader import Loader
from ..data.probe_rows import labelled_positions, sample_of
from ..data.tokenize import is_raw_text, most_tokens, tokenize
from ..data.validation import ValueRanges, check_lengths, check_sample
from ..errors import DataError, SettingsError
from ..objective.forward import Forward, accepted_arguments
from ..objective.item_counts import ItemCounter, targets_of, tensors_of
from ..objective.objective import Objective
from ..objective.self_check import measured_objective
from ..planning.shuffle import hold_out
from ..runtime.state_guards import inspection_mode
from ..settings import Recipe
from .build_collator import build_padding, build_row_collator, check_padded_labels, measure_documents, packed_collator
from .config import Components, RunConfig


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on: `train` and `val` load the micro-batches of `train_rows` and `val_rows`.

    Attributes:
        packed: whether rows hold several documents each.
    """

    train_rows: Rows
    val_rows: Rows | None
    objective: Objective
    train: Loader
    val: Loader | None
    ignore_index: int
    synthetic: bool
    packed: bool = False

    def notes(self) -> list[str]:
        """What a user should know of the data and the loss before training starts."""
        objective = self.objective
        widths = ", rows padded to one width per window" if objective.padding_sensitive else ""
        notes = [f"Loss: mean over {objective.report.counted_by}{widths}"]
        if self.packed:
            notes.append("Rows: packed; `position_ids` keep their documents apart")
        if self.synthetic:
            notes.insert(0, "Data: SYNTHETIC random tokens, because `train_data` is None; losses mean nothing")
        return notes


def build_data(config: RunConfig, accelerator: Accelerator, stream: Stream | None) -> TrainingData:
    """Make rows of the data, check a sample of them, and measure how the loss is counted.

    Args:
        config: with the model on its device, and not wrapped yet.
        stream: the training data, where they are a stream.

    Raises:
        DataError: for data that cannot be trained on.
    """
    components, recipe, runtime = config.components, config.recipe, config.runtime
    rows, val_rows = _split(components, recipe, accelerator, stream)
    longest = None
    if runtime.compile:
        longest = rows.longest(most_tokens(components.tokenizer, components.configuration, components.model))
    ignore_index = _ignore_index(components, rows)
    padding = build_padding(components, rows, val_rows, ignore_index, longest)
    row_collator = build_row_collator(components, padding)
    for each in (rows, val_rows):
        if each is not None and runtime.max_tokens is not None:
            check_lengths(each, runtime.max_tokens, row_collator)
    row_collator.find_draws(rows)
    if val_rows is not None:
        val_rows.find_draws()
    sample = check_sample(rows, row_collator, ValueRanges.of_tokens(components.model))
    forward = Forward(components.model, sample, components.loss_fn, token_ids=rows.are_token_ids)
    ranges = _ranges(components, forward, rows, row_collator, ignore_index, accelerator.device)
    check_sample(rows, row_collator, ranges)
    if val_rows is not None:
        _check_validation(components, sample, check_sample(val_rows, row_collator, ranges))
    labelled = labelled_positions(rows, row_collator, ignore_index)
    objective = _objective(components, forward, rows, row_collator, labelled, ignore_index)
    if padding is not None:
        check_padded_labels(components, forward, objective, rows, padding, labelled)
        rows_at_once = 1 if runtime.batch_size == 1 else 2
        padding.documents = measure_documents(components, forward, objective, rows, padding, labelled, rows_at_once)
        sample = check_sample(rows, row_collator, ranges)
    on_host = all(t.device.type == "cpu" for t in tensors_of(sample))
    pin_memory = accelerator.device.type == "cuda" and on_host

    def loader(rows: Rows, row_collator: RowCollator, labelled: Sequence[int] = ()) -> Loader:
        return Loader(
            rows, row_collator, objective, ranges, labelled, num_workers=runtime.num_workers, pin_memory=pin_memory
        )

    val = None if val_rows is None else loader(val_rows, row_collator)
    if runtime.padding_free:
        row_collator = packed_collator(components, forward, objective, rows, row_collator, labelled, ignore_index)
    train = loader(rows, row_collator, labelled)
    return TrainingData(
        rows,
        val_rows,
        objective,
        train,
        val,
        ignore_index,
        synthetic=components.train_data is None,
        packed=padding is not None and padding.documents.kept_apart is True and "attention_mask" not in sample,
    )


def _split(
    components: Components, recipe: Recipe, accelerator: Accelerator, stream: Stream | None
) -> tuple[Rows, Rows | None]:
    """Training and validation rows, tokenised."""
    given = None if components.val_data is None else as_rows(components.val_data, "val_data")
    if stream is not None:
        rows = _tokenize(StreamRows(stream), components, accelerator)
    elif components.train_data is None:
        rows = _synthetic(components.configuration, recipe.random_seed)
    else:
        rows = _tokenize(as_rows(components.train_data, "train_data"), components, accelerator)
    if stream is not None or given is not None:
        return rows, None if given is None else _tokenize(given, components, accelerator)
    kept, held = hold_out(len(rows), recipe.validation_split, recipe.random_seed)
    part = f"What `validation_split`, {recipe.validation_split}, holds out of "
    return rows.subset(kept), rows.subset(held, part) if held else None


def _synthetic(config: Any, seed: int) -> Rows:
    vocab_size = getattr(config, "vocab_size", None)
    if not isinstance(vocab_size, int):
        raise DataError(
            "`train_data` is None, and `config` has no `vocab_size` to draw synthetic token ids from. "
            "Give training data, or a config with a vocab_size."
        )
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "block_size"))
    return synthetic_rows(vocab_size, next((n for n in limits if isinstance(n, int)), None), seed)


def _tokenize(rows: Rows, components: Components, accelerator: Accelerator) -> Rows:
    # A collator of the user's own may be what tokenises.
    if not is_raw_text(rows, accepted_arguments(components.model)) or (
        components.tokenizer is None and components.data_collator is not None
    ):
        return rows
    config = components.configuration
    generates = getattr(components.model, "can_generate", lambda: False)()
    with accelerator.main_process_first():  # the others find the table that it has cached
        return tokenize(
            rows,
            components.tokenizer,
            config,
            components.model,
            next_token=generates and not getattr(config, "is_encoder_decoder", False),
        )


def _ignore_index(components: Components, rows: Rows) -> int:
    """The label that the loss leaves out. Heads that label pixels have one of their own."""
    row = rows.fetch([0])[0]
    labels = row.get("labels", row.get("label")) if isinstance(row, Mapping) else None
    if components.loss_fn is None and labels is not None and np.ndim(labels) > 1:
        return getattr(components.configuration, "semantic_loss_ignore_index", components.ignore_index)
    return components.ignore_index


def _ranges(
    components: Components,
    forward: Forward,
    rows: Rows,
    row_collator: RowCollator,
    ignore_index: int,
    device: torch.device,
) -> ValueRanges:
    """What the numbers in a batch may be. A `loss_fn` that does not say what it ignores may take any label."""
    ranges = ValueRanges.of_tokens(components.model)
    if components.loss_fn is not None and not hasattr(components.loss_fn, "ignore_index"):
        return ranges
    first = send_to_device(row_collator.seeded(rows, [0], 0), device)
    with inspection_mode(components.model):
        return ranges.with_classes(forward.n_classes(components.model, first), ignore_index)


def _check_validation(components: Components, train: Any, val: Any) -> None:
    if isinstance(train, Mapping) and isinstance(val, Mapping) and train.keys() - val.keys():
        raise DataError(
            f"`val_data` lacks the columns {sorted(train.keys() - val.keys())} that `train_data` has. "
            "Give it the same columns."
        )
    if components.compute_metrics is not None and targets_of(val) is None:
        raise SettingsError(
            ["`compute_metrics` compares with `labels`, of which the validation rows have none. Leave it out."]
        )


def _objective(
    components: Components,
    forward: Forward,
    rows: Rows,
    row_collator: RowCollator,
    labelled: list[int],
    ignore_index: int,
) -> Objective:
    weights = getattr(components.loss_fn, "weight", None)
    try:
        return measured_objective(
            components.model,
            forward,
            sample_of(rows, row_collator, labelled),
            item_counter=ItemCounter(
                ignore_index, weights if isinstance(weights, torch.Tensor) and weights.ndim == 1 else None
            ),
            count_items=components.count_items,
            sums=components.reduction == "sum",
        )
    except (DataError, SettingsError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if components.train_data is None:
            raise DataError(
                f"`train_data` is None, and {type(components.model).__name__} cannot train on synthetic tokens, "
                f"each of which is the target of the one before: {error!r}. Give training data."
            ) from error
        used = (
            ", ".join(f"`{name}`" for name in ("loss_fn", "count_items") if getattr(components, name)) or "this model"
        )
        raise DataError(
            f"The loss of {_failing(components, forward, rows, row_collator, labelled)} cannot be computed: "
            f"{error!r}. Check that its columns, lengths and labels are those that {used} was made for."
        ) from error


def _failing(
    components: Components, forward: Forward, rows: Rows, row_collator: RowCollator, candidates: list[int]
) -> str:
    """The first row that fails by itself, by its name."""
    device = next(components.model.parameters()).device
    for position in candidates:
        try:
            with inspection_mode(components.model):
                forward(components.model, send_to_device(row_collator.seeded(rows, [position], 0), device))
        except Exception:
            return f"{rows.name_of(position)} of `{rows.argument}`"
    return f"the first rows of `{rows.argument}`"
