"""From what the user brought along to rows, an objective and loaders."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from ..data.collator import Collation, PaddingCollator
from ..data.dataset import Rows, as_rows, synthetic_rows
from ..data.iterable import Stream, StreamRows
from ..data.loader import Loader
from ..data.packing import PackingCollator
from ..data.tokenize import is_raw_text, most_tokens, tokenized
from ..data.validation import Ranges, check_lengths, check_sample, labelled_positions, sample_of
from ..errors import DataError, SettingsError
from ..objective.forward import Forward, accepted_arguments
from ..objective.item_counts import Counting, targets_of, tensors_of
from ..objective.objective import Objective
from ..objective.probe import EXPLAINED
from ..objective.self_check import difference_of_packing, measured_objective
from ..planning.shuffle import hold_out
from ..runtime.state_guards import only_looking
from ..settings import Recipe, Runtime
from .components import Parts

_FEW = 4  # rows to see whether a model keeps packed rows apart


@dataclass(frozen=True)
class Assembly:
    """What a run trains on: `train` and `val` load the micro-batches of `train_rows` and `val_rows`."""

    train_rows: Rows
    val_rows: Rows | None
    objective: Objective
    train: Loader
    val: Loader | None
    ignore_index: int
    synthetic: bool

    def tell_through(self, tell: Callable[[str], None]) -> None:
        """Has what befalls the loaders' workers shown to the user."""
        self.train.tell = tell
        if self.val is not None:
            self.val.tell = tell

    def notes(self) -> list[str]:
        """What a user should know of the data and the loss before training starts."""
        objective = self.objective
        widths = ", rows padded to one width per window" if objective.padding_sensitive else ""
        notes = [f"Loss: mean over {objective.findings.counted_by}{widths}"]
        if self.synthetic:
            notes.insert(0, "Data: SYNTHETIC random tokens, because `train_data` is None; losses mean nothing")
        return notes


def assemble(
    parts: Parts, recipe: Recipe, runtime: Runtime, accelerator: Accelerator, stream: Stream | None
) -> Assembly:
    """Makes rows of the data, checks a sample of them, and measures how the loss is counted.

    Args:
        parts: with the model on its device, and not wrapped yet.
        stream: of the training data, where they are one.

    Raises:
        DataError: for data that cannot be trained on.
    """
    rows, val_rows = _split(parts, recipe, accelerator, stream)
    ignore_index = _ignore_index(parts, rows)
    collation = _collation(parts, ignore_index, _longest(parts, rows) if runtime.compile else None)
    for each in (rows, val_rows):
        if each is not None and runtime.max_tokens is not None:
            check_lengths(each, runtime.max_tokens, collation)
    collation.find_draws(rows)
    if val_rows is not None:
        val_rows.find_draws()
    sample = check_sample(rows, collation, Ranges.of_tokens(parts.model))
    forward = Forward(parts.model, sample, parts.loss_fn, token_ids=rows.are_token_ids)
    ranges = _ranges(parts, forward, rows, collation, ignore_index, accelerator.device)
    check_sample(rows, collation, ranges)
    if val_rows is not None:
        _check_validation(parts, sample, check_sample(val_rows, collation, ranges))
    labelled = labelled_positions(rows, collation, ignore_index)
    objective = _objective(parts, forward, rows, collation, labelled, ignore_index)
    on_host = all(t.device.type == "cpu" for t in tensors_of(sample))
    pin_memory = accelerator.device.type == "cuda" and on_host

    def loader(rows: Rows, collation: Collation, labelled: Sequence[int] = ()) -> Loader:
        return Loader(
            rows, collation, objective, ranges, labelled, num_workers=runtime.num_workers, pin_memory=pin_memory
        )

    val = None if val_rows is None else loader(val_rows, collation)
    if runtime.padding_free:
        collation = _packed(parts, forward, objective, rows, collation, labelled, ignore_index)
    train = loader(rows, collation, labelled)
    return Assembly(rows, val_rows, objective, train, val, ignore_index, parts.train_data is None)


def _split(parts: Parts, recipe: Recipe, accelerator: Accelerator, stream: Stream | None) -> tuple[Rows, Rows | None]:
    """Training and validation rows, tokenised."""
    given = None if parts.val_data is None else as_rows(parts.val_data, "val_data")
    if stream is not None:
        rows = _tokenised(StreamRows(stream), parts, accelerator)
    elif parts.train_data is None:
        rows = _synthetic(parts.configuration, recipe.random_seed)
    else:
        rows = _tokenised(as_rows(parts.train_data, "train_data"), parts, accelerator)
    if stream is not None or given is not None:
        return rows, None if given is None else _tokenised(given, parts, accelerator)
    kept, held = hold_out(len(rows), recipe.validation_split, recipe.random_seed)
    part = f"What `validation_split`, {recipe.validation_split}, holds out of "
    return rows.subset(kept), rows.subset(held, part) if held else None


def _longest(parts: Parts, rows: Rows) -> int | None:
    """The length of the longest row, where it can be told; of a stream, of the longest that could come."""
    if isinstance(rows, StreamRows):
        return most_tokens(parts.tokenizer, parts.configuration, parts.model) or sys.maxsize
    lengths = rows.lengths()
    return max(lengths) if lengths else None


def _synthetic(config: Any, seed: int) -> Rows:
    vocab_size = getattr(config, "vocab_size", None)
    if not isinstance(vocab_size, int):
        raise DataError(
            "`train_data` is None, and `config` has no `vocab_size` to draw synthetic token ids from. "
            "Give training data, or a config with a vocab_size."
        )
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "block_size"))
    return synthetic_rows(vocab_size, next((n for n in limits if isinstance(n, int)), None), seed)


def _tokenised(rows: Rows, parts: Parts, accelerator: Accelerator) -> Rows:
    # A collator of the user's own may be what tokenises.
    if not is_raw_text(rows, accepted_arguments(parts.model)) or (
        parts.tokenizer is None and parts.data_collator is not None
    ):
        return rows
    config = parts.configuration
    generates = getattr(parts.model, "can_generate", lambda: False)()
    with accelerator.main_process_first():  # the others find the table that it has cached
        return tokenized(
            rows,
            parts.tokenizer,
            config,
            parts.model,
            next_token=generates and not getattr(config, "is_encoder_decoder", False),
        )


def _collation(parts: Parts, ignore_index: int, bucketed_up_to: int | None) -> Collation:
    accepted = accepted_arguments(parts.model)
    if parts.data_collator is not None:
        return Collation(parts.data_collator, accepted)
    return Collation(
        PaddingCollator(
            accepted,
            pad_token_id=parts.pad_token_id,
            padding_side=getattr(parts.tokenizer, "padding_side", "right"),
            ignore_index=ignore_index,
            keep_all=parts.loss_fn is not None or parts.count_items is not None,
            bucketed_up_to=bucketed_up_to,
        )
    )


def _packed(
    parts: Parts,
    forward: Forward,
    objective: Objective,
    rows: Rows,
    padded: Collation,
    labelled: list[int],
    ignore_index: int,
) -> Collation:
    """Rows one behind the other, where the model is seen to keep them apart.

    Raises:
        SettingsError: where it does not, or nobody can tell.
    """
    unfit = {
        "a `data_collator` is given, which pads": parts.data_collator is not None,
        "it is no causal language model (labels are not predicted from the token before)": not objective.shifts,
        "its `forward` takes no `position_ids`": "position_ids" not in (forward.accepted or ()),
    }
    for reason, holds in unfit.items():
        if holds:
            raise SettingsError(
                [
                    f"`padding_free` is True, but {type(parts.model).__name__} cannot do without padding: {reason}. "
                    "Leave `padding_free` out: rows are padded to the longest of their micro-batch then."
                ]
            )
    packed = Collation(PackingCollator(ignore_index), forward.accepted)
    few = (labelled * _FEW)[:_FEW]  # one row has nobody to attend to
    off = difference_of_packing(parts.model, forward, objective, padded(rows, few), packed(rows, few))
    if not off <= EXPLAINED:
        raise SettingsError(
            [
                f"`padding_free` is True, but {type(parts.model).__name__} lets rows that lie one behind the other "
                f"attend to each other: their loss is {100 * off:.2g}% off. Leave `padding_free` out, or load the "
                "model with another `attn_implementation` ('sdpa', 'flash_attention_2')."
            ]
        )
    return packed


def _ignore_index(parts: Parts, rows: Rows) -> int:
    """The label that the loss leaves out. Heads that label pixels have one of their own."""
    row = rows.fetch([0])[0]
    labels = row.get("labels", row.get("label")) if isinstance(row, Mapping) else None
    if parts.loss_fn is None and labels is not None and np.ndim(labels) > 1:
        return getattr(parts.configuration, "semantic_loss_ignore_index", parts.ignore_index)
    return parts.ignore_index


def _ranges(
    parts: Parts, forward: Forward, rows: Rows, collation: Collation, ignore_index: int, device: torch.device
) -> Ranges:
    """What the numbers in a batch may be. A `loss_fn` that does not say what it ignores may take any label."""
    ranges = Ranges.of_tokens(parts.model)
    if parts.loss_fn is not None and not hasattr(parts.loss_fn, "ignore_index"):
        return ranges
    first = send_to_device(collation.seeded(rows, [0], 0), device)
    with only_looking(parts.model):
        return ranges.with_classes(forward.n_classes(parts.model, first), ignore_index)


def _check_validation(parts: Parts, train: Any, val: Any) -> None:
    if isinstance(train, Mapping) and isinstance(val, Mapping) and train.keys() - val.keys():
        raise DataError(
            f"`val_data` lacks the columns {sorted(train.keys() - val.keys())} that `train_data` has. "
            "Give it the same columns."
        )
    if parts.compute_metrics is not None and targets_of(val) is None:
        raise SettingsError(
            ["`compute_metrics` compares with `labels`, of which the validation rows have none. Leave it out."]
        )


def _objective(
    parts: Parts, forward: Forward, rows: Rows, collation: Collation, labelled: list[int], ignore_index: int
) -> Objective:
    weights = getattr(parts.loss_fn, "weight", None)
    try:
        return measured_objective(
            parts.model,
            forward,
            sample_of(rows, collation, labelled),
            counting=Counting(
                ignore_index, weights if isinstance(weights, torch.Tensor) and weights.ndim == 1 else None
            ),
            count_items=parts.count_items,
            sums=parts.reduction == "sum",
        )
    except (DataError, SettingsError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if parts.train_data is None:
            raise DataError(
                f"`train_data` is None, and {type(parts.model).__name__} cannot train on synthetic tokens, each of "
                f"which is the target of the one before: {error!r}. Give training data."
            ) from error
        used = ", ".join(f"`{name}`" for name in ("loss_fn", "count_items") if getattr(parts, name)) or "this model"
        raise DataError(
            f"The loss of {_failing(parts, forward, rows, collation, labelled)} cannot be computed: {error!r}. Check "
            f"that its columns, lengths and labels are those that {used} was made for."
        ) from error


def _failing(parts: Parts, forward: Forward, rows: Rows, collation: Collation, candidates: list[int]) -> str:
    """The first row that fails by itself, by its name."""
    device = next(parts.model.parameters()).device
    for position in candidates:
        try:
            with only_looking(parts.model):
                forward(parts.model, send_to_device(collation.seeded(rows, [position], 0), device))
        except Exception:
            return f"{rows.name_of(position)} of `{rows.argument}`"
    return f"the first rows of `{rows.argument}`"
