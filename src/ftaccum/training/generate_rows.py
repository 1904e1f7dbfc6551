"""Generate texts for rows of tokens outside of a training run."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..objective.item_counts import IGNORE_INDEX
from ..runtime.model_traits import is_encoder_decoder
from ..runtime.state_guards import training_mode
from .generator import Generator


def generate_rows(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    batch_size: int = 8,
    seed: int = 42,
    numbers: Sequence[int] | None = None,
) -> list[list[int]]:
    """Return the token ids that a model generates for each row, in the order of the rows.

    A decoder-only model continues the tokens before a row's first label, or all tokens if it has no labels. An
    encoder-decoder generates from the `input_ids`. The results are those of an evaluation with `generation_kwargs`,
    and do not depend on the batch size. The model's mode and the random generators are restored.

    Args:
        model: the unwrapped model, on its device.
        rows: rows with `input_ids`, and optionally `labels`; a list of dicts or a `datasets.Dataset`. Other columns are
            ignored.
        options: arguments of `model.generate`, such as {"max_new_tokens": 64}. Without others, decoding is greedy.
        tokenizer: names the padding token, and finds the `stop_strings`, if there are any.
        batch_size: rows to generate together.
        seed: seeds the sampling of each row, together with its number.
        numbers: the numbers of the rows; None counts from 0. A process that generates for some of the rows gives
            theirs, so that sampling is the same on any number of processes.

    Raises:
        DataError: if a row has no tokens to start from.
        SettingsError: if the model cannot generate, or an option is invalid.
    """
    generator = Generator(
        model, options, tokenizer=tokenizer, pad_token_id=getattr(tokenizer, "pad_token_id", None), seed=seed
    )
    device = next(model.parameters()).device
    numbers = range(len(rows)) if numbers is None else numbers
    starts = [_start(row, f"row {number}", model, device) for row, number in zip(rows, numbers, strict=True)]
    order = sorted(range(len(starts)), key=lambda n: -len(starts[n]))
    texts: dict[int, list[int]] = {}
    with torch.no_grad(), training_mode(model, training=False):
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            found = generator.of_tokens(model, [starts[n] for n in chosen], [numbers[n] for n in chosen])
            texts |= {n: [i for i in ids if i != IGNORE_INDEX] for n, ids in zip(chosen, found.tolist(), strict=True)}
    return [texts[n] for n in range(len(starts))]


def _start(row: Mapping[str, Any], name: str, model: Any, device: torch.device) -> Tensor:
    """Return the tokens to generate from."""
    ids = list(row.get("input_ids") or ())
    labels = None if is_encoder_decoder(model) else row.get("labels")
    if labels is not None:
        ids = ids[: next((n for n, label in enumerate(labels) if label != IGNORE_INDEX), None)]
    if not ids:
        raise DataError(
            f"There are no tokens to generate from in {name}: its `input_ids` are missing or empty, or its first token "
            "has a label. Set the labels of a prompt to -100, and drop empty rows."
        )
    return torch.tensor(ids, device=device)
