"""The model card of a trained model: metadata for the hub, and a text in Markdown."""

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .card_sections import data_section, exactness_section, results_section, training_section
from .loading import SavedModel, loading_section
from .markdown import code, escape, without_control_characters
from .run_metadata import Named, RunMetadata

CARD = "README.md"  # the name of the file
TAG = "ftaccum"  # marks the cards that ftaccum has written
_LOADING = "How to load"
_LOADING_SECTION = re.compile(rf"^## {_LOADING}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- written by ftaccum \(\w+\) -->")
_OTHER_TASK = "other"  # of a model that belongs to no task on the hub


def model_card(metadata: RunMetadata, saved: SavedModel, folder: str) -> ModelCard:
    """Return the card of a model that a run has trained.

    Args:
        metadata: what to say of the run.
        saved: what the folder contains.
        folder: the name of the folder.
    """
    place = metadata.repository or folder
    sections = {
        _LOADING: loading_section(saved, place, is_repository=metadata.repository is not None),
        "Results": results_section(metadata),
        "Data": data_section(metadata, saved.classes),
        "Training": training_section(metadata),
        "Exactness of the gradient accumulation": exactness_section(metadata),
    }
    return _card(_card_data(metadata, saved), [f"# {escape(metadata.name)}", _lead(metadata), *_headed(sections)])


def merged_card(earlier: str | None, saved: SavedModel, base: Named | None, folder: str) -> ModelCard:
    """Return the card of a model that adapters were merged into.

    Args:
        earlier: the card of the adapters; None if there is none. Only one that ftaccum wrote is used.
        saved: what the folder contains.
        base: the base model, if it has a name.
        folder: the name of the folder.
    """
    loading = f"{loading_section(saved, folder, is_repository=False)}\n\nThe adapters are merged into the weights."
    if earlier is None or not _is_own(earlier):
        name = "another model" if base is None else code(base.name)
        lead = f"Adapters that were trained on {name}, merged into its weights."
        return _card(_new_card_data(saved, base), [f"# {escape(folder)}", lead, *_headed({_LOADING: loading})])
    card = ModelCard(earlier)
    data = {**card.data.to_dict(), **_new_card_data(saved, base).to_dict()}
    section = f"## {_LOADING}\n\n{loading}\n\n"
    text = _LOADING_SECTION.sub(lambda _: section, _MARK.sub("", card.text).strip() + "\n")
    return _card(ModelCardData(**data), [text.strip()])


def is_unchanged_card(text: str) -> bool:
    """Return whether ftaccum wrote a card, and nobody has edited it since."""
    before, mark = text.rstrip().rpartition("<!--")[::2]
    return bool(before) and _mark(before) == f"<!--{mark}\n"


def _is_own(text: str) -> bool:
    """Return whether ftaccum wrote a card, edited or not. If it cannot be read, it did not."""
    try:
        return TAG in (ModelCard(text).data.get("tags") or ())
    except Exception:  # not YAML, or not the metadata of a model
        return False


def _mark(text: str) -> str:
    """Return the last line of a card: a checksum of the text before it, which tells whether someone has edited it."""
    normal = "\n".join(text.strip().splitlines())
    return f"<!-- written by ftaccum ({hashlib.sha256(normal.encode()).hexdigest()[:16]}) -->\n"


def save_card(card: ModelCard, folder: Path) -> None:
    """Write a card into the folder of a model. It replaces the card of PEFT."""
    card.save(folder / CARD)


def _card(data: ModelCardData, paragraphs: list[str]) -> ModelCard:
    text = without_control_characters("\n\n".join(paragraphs))
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n\n")
    card.text += _mark(card.content)
    return card


def _headed(sections: Mapping[str, str]) -> list[str]:
    return [f"## {title}\n\n{text}" for title, text in sections.items()]


def _lead(metadata: RunMetadata) -> str:
    base = "A model" if metadata.base is None else f"{code(metadata.base.name)},"
    data = ", ".join(code(each.name) for each in metadata.train_data)
    return f"{base} fine-tuned{f' on {data}' if data else ''} with ftaccum. {metadata.ended_by}".strip()


def _card_data(metadata: RunMetadata, saved: SavedModel) -> ModelCardData:
    data = _new_card_data(saved, metadata.base)
    data.datasets = list(dict.fromkeys(d.name for d in (*metadata.train_data, *metadata.val_data) if d.on_hub)) or None
    if results := _evaluations(metadata, saved):
        data.model_name, data.eval_results = metadata.name, results
        data.metrics = [each.metric_type for each in results if each.metric_type != "loss"] or None
    return data


def _new_card_data(saved: SavedModel, base: Named | None) -> ModelCardData:
    """Return the metadata that follow from the files. The hub refuses names of base models that are not on it."""
    return ModelCardData(
        base_model=base.name if base is not None and base.on_hub else None,
        library_name=saved.library,
        pipeline_tag=saved.task,
        tags=[TAG, *([saved.adapter] if saved.adapter else [])],
    )


def _evaluations(metadata: RunMetadata, saved: SavedModel) -> list[EvalResult]:
    """Return the finite results of the evaluation of the saved weights, for the hub."""
    measured = metadata.saved_evaluation()
    data: Named = next(iter(metadata.val_data or metadata.train_data), Named("the validation rows"))
    return [
        EvalResult(
            task_type=saved.task or _OTHER_TASK,
            dataset_type=data.name if data.on_hub else "local",
            dataset_name=data.name,
            dataset_config=data.config,
            dataset_split=data.split if metadata.val_data else "validation",
            metric_type=name,
            metric_name="Validation loss" if name == "loss" else name,
            metric_value=value,
        )
        for name, value in measured.items()
        if math.isfinite(value)
    ]
