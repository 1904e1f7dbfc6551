"""The sections of a model card on results, data, training and exactness."""

import math
from collections.abc import Mapping, Sequence

from .format import format_duration, format_number, known
from .markdown import code, escape
from .noise_words import describe_scale, is_known
from .run_metadata import Evaluation, Named, RunMetadata

_LISTED = 50  # labels; more than these are left to the configuration


def results_section(metadata: RunMetadata) -> str:
    """Return the losses and metrics of the evaluations, and which weights are saved."""
    parts = [_weights(metadata)]
    if evaluations := metadata.evaluations():
        parts.append(_evaluation_table(evaluations))
    losses = metadata.result["train_loss_history"]
    loss = format_number(known(losses[-1]) if losses else None)
    parts.append(f"Training loss of the last epoch: {loss}." + ("" if evaluations else " There was no validation."))
    return "\n\n".join(parts)


def data_section(metadata: RunMetadata, classes: Mapping[int, str]) -> str:
    """Return the names of the data, the numbers of rows, and the classes that the model distinguishes, by number."""
    rows = {"Training": (metadata.train_data, _training_rows(metadata))}
    if metadata.held_out:
        rows["Validation"] = (metadata.train_data, f"{_count(metadata.n_val)}, held out of the training data")
    elif metadata.n_val is not None:
        rows["Validation"] = (metadata.val_data, _count(metadata.n_val))
    table = _table(
        ("", "data", "rows"),
        [
            (name, ", ".join(map(_describe_data, data)) or "given in Python", count)
            for name, (data, count) in rows.items()
        ],
    )
    if not 1 < len(classes) <= _LISTED:
        return table
    return f"{table}\n\nLabels: {', '.join(f'{number} {code(name)}' for number, name in sorted(classes.items()))}."


def training_section(metadata: RunMetadata) -> str:
    """Return how updates were made, the hyperparameters, the time and the versions."""
    result = metadata.result
    passes = f"{result['passes_per_update']:.3g} forward passes per update on each process"
    settings = {**metadata.sizes, "Micro-batches": f"{metadata.cut}; {passes}"}
    if result.get("padding_fraction") is not None:
        settings["Padding"] = f"{result['padding_fraction']:.1%} of the token positions"
    settings |= metadata.hyperparameters
    skipped = result["skipped_steps"]
    settings["Updates"] = f"{result['optimizer_steps']}" + (f", and {skipped} skipped" if skipped else "")
    if not math.isnan(result["training_time"]):
        settings["Time"] = f"{format_duration(result['training_time'])} with evaluations, on {metadata.device}"
    noise = result.get("noise_scale")
    if isinstance(noise, Mapping) and is_known(noise):
        settings["Gradient noise scale"] = describe_scale(noise)
    settings["Versions"] = ", ".join(f"{name} {version}" for name, version in metadata.versions.items())
    return _table(("setting", "value"), list(settings.items()))


def exactness_section(metadata: RunMetadata) -> str:
    """Return how the loss was counted, how far accumulation is from one batch, and what audits found."""
    result = metadata.result
    if result["passes_per_update"] <= 1 and result["num_processes"] == 1:
        return f"{metadata.loss} Each update was one batch, so nothing was accumulated."
    if metadata.inexact is None:
        exactness = (
            "A check before training found that accumulating it over micro-batches gives the loss and the gradient of "
            "one large batch, except for rounding."
        )
    else:
        off = f": over separate micro-batches it is up to {metadata.inexact:.2%} off" if metadata.inexact else ""
        exactness = f"Accumulating it only approximates one large batch{off}."
    return f"{metadata.loss} {exactness} {_audits(result['audits'])}"


def _audits(audits: Sequence[Mapping[str, float]]) -> str:
    if not audits:
        return "No update was audited."
    worst = max(audits, key=lambda audit: audit["error"] / (audit["tolerance"] or 1))
    references = " or ".join(dict.fromkeys(str(audit["reference"]) for audit in audits))
    return (
        f"Audits of {len(audits)} {'update' if len(audits) == 1 else 'updates'} compared the accumulated gradient with "
        f"the gradient of the same rows in {references}. The worst relative error was {worst['error']:.1e}; the "
        f"tolerance for rounding was {worst['tolerance']:.1e}."
    )


def _weights(metadata: RunMetadata) -> str:
    restored, result = metadata.result["restored_update"], metadata.result
    if not metadata.is_evaluated:
        return (
            "The saved weights are not those of an evaluation: a callback has evaluated or saved other weights than "
            "those in training, such as an average of them. The results are those of the weights that were evaluated."
        )
    if restored is not None:
        by = escape(metadata.criterion)
        return f"The saved weights are those of the best evaluation by {by}, after update {restored}."
    return f"The saved weights are those after the last update, {result['optimizer_steps'] + result['skipped_steps']}."


def _evaluation_table(evaluations: Sequence[Evaluation]) -> str:
    metrics = list(dict.fromkeys(name for each in evaluations for name in each.metrics))
    rows = [
        (
            each.name,
            str(each.update),
            format_number(each.loss),
            *(format_number(each.metrics.get(name)) for name in metrics),
        )
        for each in evaluations
    ]
    return _table(("evaluation", "update", "validation loss", *map(escape, metrics)), rows)


def _training_rows(metadata: RunMetadata) -> str:
    """Return the number of training rows, and of how many if `max_train_rows` has left out others."""
    n_rows, most = metadata.n_train, metadata.max_train_rows
    n_read = (n_rows or 0) + ((metadata.n_val or 0) if metadata.held_out else 0)
    if most is None or n_read < most:
        return _count(n_rows)
    return f"the first {most:,}" if n_read == n_rows else f"{_count(n_rows)} of the first {most:,}"


def _describe_data(data: Named) -> str:
    config = f", configuration {data.config}" if data.config else ""
    split = f", split {data.split}" if data.on_hub and data.split else ""
    return f"{code(data.name)}{config}{split}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _count(n_rows: int | None) -> str:
    return "unknown" if n_rows is None else f"{n_rows:,}"
