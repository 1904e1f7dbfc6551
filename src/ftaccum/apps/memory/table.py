"""The table that `ftaccum plan --model` prints."""

from collections.abc import Sequence
from typing import Any

from ...errors import SettingsError
from ...insight.format import format_bytes
from .estimate import MemoryEstimate, MemorySetup, estimate_memory, kept_of_blocks
from .meta_model import model_without_weights
from .optimizer_states import NOTES

_LABELS = {
    "weights": "weights",
    "buffers": "buffers",
    "gradients": "gradients",
    "gradient_sums": "float32 sums of gradients",
    "optimizer_states": "optimizer states",
    "ddp_buckets": "DDP's copies of gradients",
    "gathered_weights": "gathered weights",
    "whole_gradients": "gradients before they are sharded",
    "autocast_copies": "16-bit copies of weights",
    "activations": "activations (estimate)",
    "logits": "logits and their loss (estimate)",
}


def memory_table(named: Any, recipe: Any, runtime: Any, batch_size: int, num_processes: int) -> str:
    """Return the memory per process of a run as text, for whole copies and for shards.

    Args:
        named, recipe, runtime: instances of `PlannedModel`, `MemoryRecipe` and `MemoryRuntime`.
        batch_size: the rows of a micro-batch on one process.
        num_processes: the number of processes.

    Raises:
        SettingsError: if the model cannot be built, or the length of its rows is unknown.
    """
    model = model_without_weights(named.model, named.task, named.dtype)
    length = recipe.max_length or getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length is None:
        raise SettingsError(
            ["`max_length` is None, and the config of the model names no most positions. Give the tokens of a row."]
        )
    setup = MemorySetup(
        num_processes=num_processes,
        tokens=batch_size * length,
        optimizer=recipe.optimizer or "adamw",
        autocast=runtime.mixed_precision in ("bf16", "fp16"),
        gradient_checkpointing=runtime.gradient_checkpointing,
        accumulate_in_fp32=runtime.accumulate_in_fp32,
        sync=runtime.sync,
    )
    columns = {"whole copies": estimate_memory(model, setup, sharded=False)}
    if num_processes > 1:
        columns = {"whole copies (DDP)": columns["whole copies"]}
        columns[f"FSDP2 over {num_processes}"] = estimate_memory(model, setup, sharded=True)
    n_weights = sum(p.numel() for p in model.parameters())
    title = (
        f"Memory per process: {type(model).__name__} with {n_weights:,} weights in "
        f"{str(next(model.parameters()).dtype).removeprefix('torch.')}, {setup.optimizer}, micro-batches of "
        f"{batch_size} × {length:,} tokens"
    )
    return "\n".join([title, *_rows(columns), *_notes(model, setup)])


def _rows(columns: dict[str, MemoryEstimate]) -> list[str]:
    widths = [max(len(name), 10) for name in columns]
    first = max(map(len, _LABELS.values()))
    lines = [_line("", list(columns), widths, first)]
    for name, label in _LABELS.items():
        numbers = [getattr(estimate, name) for estimate in columns.values()]
        if any(number != 0 for number in numbers):
            shown = ["unknown" if n is None else "–" if n == 0 else format_bytes(n) for n in numbers]
            lines.append(_line(label, shown, widths, first))
    return [*lines, _line("total", [format_bytes(estimate.total) for estimate in columns.values()], widths, first)]


def _line(label: str, cells: Sequence[str], widths: Sequence[int], first: int) -> str:
    return "  ".join([f"  {label:<{first}}", *(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))])


def _notes(model: Any, setup: MemorySetup) -> list[str]:
    notes = [
        "Estimates are by formula and not yet checked on a GPU. The other rows are what the fullest process holds."
    ]
    try:
        kept_of_blocks(model, setup)
    except ValueError as error:
        notes.append(f"Activations are unknown, and not in the total, because {error}.")
    if setup.optimizer in NOTES:
        notes.append(NOTES[setup.optimizer])
    notes.append("Not counted: the device's own context (about 0.5 to 1 GB) and memory lost to fragmentation.")
    return notes
