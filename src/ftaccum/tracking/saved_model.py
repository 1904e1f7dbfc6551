"""Write the model card into the folder of a saved model, from what the folder contains."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..insight.loading import SavedModel
from ..insight.model_card import CARD, merged_card, model_card, save_card
from ..insight.run_metadata import Named, RunMetadata, named_model
from ..runtime.log import logger
from .auto_classes import auto_class_named, auto_class_of_adapters

ADAPTER = "adapter_config.json"  # PEFT's file that marks a folder of adapters

_WITH_LABELS = {"text-classification", "token-classification", "image-classification"}


def write_card(model: Any, metadata: RunMetadata, folder: Path, name: str) -> None:
    """Write the card of a model into the folder that it has been saved in. If that fails, log a warning.

    Args:
        folder: the folder with the files of the model.
        name: the name that the folder will have.
    """
    try:
        save_card(model_card(metadata, describe_model(model, folder, metadata.base), name), folder)
    except Exception as error:  # a card must not cost a trained model
        _report(folder, error)


def write_merged_card(model: Any, adapter: Path, base: str | None, folder: Path, name: str) -> None:
    """Write the card of a model that adapters were merged into: that of the adapters, but for how the model is loaded.

    If that fails, log a warning.

    Args:
        adapter: the folder of the adapters.
        base: the name or folder of the base model; None takes the one that the adapters name.
        folder: the folder with the files of the model.
        name: the name that the folder will have.
    """
    try:
        earlier = (adapter / CARD).read_text(encoding="utf-8") if (adapter / CARD).is_file() else None
        trained_on = named_model(base or _read(adapter / ADAPTER).get("base_model_name_or_path"))
        save_card(merged_card(earlier, describe_model(model, folder, trained_on), trained_on, name), folder)
    except Exception as error:
        _report(folder, error)


def describe_model(model: Any, folder: Path, base: Named | None) -> SavedModel:
    """Return what the folder of a saved model contains.

    Args:
        model: the model that was saved, possibly with adapters.
        folder: the folder, with all files but the card.
        base: the model that was fine-tuned, if its name is known; None takes that of adapters from their files.
    """
    is_peft = (folder / ADAPTER).exists()
    inner = model.get_base_model() if is_peft and hasattr(model, "get_base_model") else model
    loader, task = _loader(type(inner))
    plain = SavedModel(
        "transformers"
        if isinstance(inner, PreTrainedModel)
        else "own"
        if hasattr(inner, "save_pretrained")
        else "torch",
        type(inner).__name__,
        loader,
        task,
        _processor(folder),
        has_chat_template=(folder / "chat_template.jinja").exists(),
        classes=_classes(inner, task),
    )
    if not is_peft:
        return plain
    adapter = _read(folder / ADAPTER)
    return _adapters(plain, inner, adapter, base or named_model(adapter.get("base_model_name_or_path")))


def _adapters(base: SavedModel, model: Any, adapter: dict[str, Any], name: Named | None) -> SavedModel:
    """Return what a folder of adapters contains, given their base model and their configuration."""
    auto_class = auto_class_of_adapters(adapter.get("task_type"))
    return SavedModel(
        "peft",
        base.class_name,
        base.loader,
        base.task,
        base.processor,
        labels=_labels(model, base.task) or None,
        classes=base.classes,
        base=name,
        adapter=str(adapter["peft_type"]).lower(),
        auto_peft=None if auto_class is None else auto_class.with_adapters,
    )


def _labels(model: Any, task: str | None) -> dict[int, str]:
    labels = getattr(getattr(model, "config", None), "id2label", None) if task in _WITH_LABELS else None
    return {int(number): str(label) for number, label in (labels or {}).items()}


def _classes(model: Any, task: str | None) -> dict[int, str]:
    """Return the labels of a classifier by number, unless their names only repeat the numbers."""
    labels = _labels(model, task)
    return {} if all(label.removeprefix("LABEL_") == str(number) for number, label in labels.items()) else labels


def _loader(kind: type) -> tuple[str | None, str | None]:
    """Return the class of Transformers that loads models of a class, if there is one, and their task on the hub."""
    if (auto_class := auto_class_named(kind.__name__)) is not None:
        return auto_class.name, auto_class.task
    return (kind.__name__ if kind.__module__.startswith("transformers.") else None), None


def _processor(folder: Path) -> str | None:
    """Return the class of Transformers that loads the tokenizer or the processor in a folder; None without one."""
    if (folder / "processor_config.json").exists():
        return "AutoProcessor"
    if (folder / "tokenizer_config.json").exists():
        return "AutoTokenizer"
    if not (file := folder / "preprocessor_config.json").exists():
        return None
    return "AutoImageProcessor" if "image_processor_type" in _read(file) else "AutoFeatureExtractor"


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _report(folder: Path, error: Exception) -> None:
    with suppress(OSError):
        (folder / CARD).unlink(missing_ok=True)  # incomplete, or that of PEFT, which may name a folder of this machine
    logger.warning(f"The model card could not be written ({type(error).__name__}: {error}). The model is saved.")
