"""Write the model card into the folder of a saved model, from what the folder contains."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from ..insight.loading import SavedModel
from ..insight.model_card import CARD, merged_card, model_card, save_card
from ..insight.run_metadata import RunMetadata, named_model
from ..runtime.log import logger

ADAPTER = "adapter_config.json"  # PEFT's file that marks a folder of adapters

# The auto classes of Transformers, a part of the name of their table of classes, and the task on the hub. If a class is
# in several tables, the first one counts.
_AUTO_CLASSES = (
    ("AutoModelForSequenceClassification", "SEQUENCE_CLASSIFICATION", "text-classification"),
    ("AutoModelForTokenClassification", "TOKEN_CLASSIFICATION", "token-classification"),
    ("AutoModelForQuestionAnswering", "QUESTION_ANSWERING", "question-answering"),
    ("AutoModelForMultipleChoice", "MULTIPLE_CHOICE", "multiple-choice"),
    ("AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM", None),  # the hub decides between translation, summarization, …
    ("AutoModelForImageTextToText", "IMAGE_TEXT_TO_TEXT", "image-text-to-text"),
    ("AutoModelForCausalLM", "CAUSAL_LM", "text-generation"),
    ("AutoModelForMaskedLM", "MASKED_LM", "fill-mask"),
    ("AutoModelForImageClassification", "IMAGE_CLASSIFICATION", "image-classification"),
    ("AutoModelForAudioClassification", "AUDIO_CLASSIFICATION", "audio-classification"),
    ("AutoModelForObjectDetection", "OBJECT_DETECTION", "object-detection"),
    ("AutoModelForSemanticSegmentation", "SEMANTIC_SEGMENTATION", "image-segmentation"),
    ("AutoModelForSpeechSeq2Seq", "SPEECH_SEQ_2_SEQ", "automatic-speech-recognition"),
    ("AutoModelForCTC", "CTC", "automatic-speech-recognition"),
)
# The tasks of PEFT whose adapters it loads together with their base model.
_AUTO_PEFT = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
}
_WITH_LABELS = {"text-classification", "token-classification", "image-classification"}


def write_card(model: Any, metadata: RunMetadata, folder: Path, name: str) -> None:
    """Write the card of a model into the folder that it has been saved in. If that fails, log a warning.

    Args:
        folder: the folder with the files of the model.
        name: the name that the folder will have.
    """
    try:
        save_card(model_card(metadata, describe_model(model, folder), name), folder)
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
        save_card(merged_card(earlier, describe_model(model, folder), trained_on, name), folder)
    except Exception as error:
        _report(folder, error)


def describe_model(model: Any, folder: Path) -> SavedModel:
    """Return what the folder of a saved model contains.

    Args:
        model: the model that was saved, possibly with adapters.
        folder: the folder, with all files but the card.
    """
    is_peft = (folder / ADAPTER).exists()
    base = model.get_base_model() if is_peft and hasattr(model, "get_base_model") else model
    loader, task = _loader(type(base))
    plain = SavedModel(
        "transformers" if isinstance(base, PreTrainedModel) else "own" if hasattr(base, "save_pretrained") else "torch",
        type(base).__name__,
        loader,
        task,
        _processor(folder),
        has_chat_template=(folder / "chat_template.jinja").exists(),
    )
    return _adapters(plain, base, _read(folder / ADAPTER)) if is_peft else plain


def _adapters(base: SavedModel, model: Any, adapter: dict[str, Any]) -> SavedModel:
    """Return what a folder of adapters contains, given their base model and their configuration."""
    config = getattr(model, "config", None)
    labels = getattr(config, "id2label", None) if base.task in _WITH_LABELS else None
    return SavedModel(
        "peft",
        base.class_name,
        base.loader,
        base.task,
        base.processor,
        labels={int(number): str(label) for number, label in labels.items()} if labels else None,
        base=named_model(adapter.get("base_model_name_or_path")),
        adapter=str(adapter["peft_type"]).lower(),
        auto_peft=_AUTO_PEFT.get(adapter.get("task_type") or ""),
    )


def _loader(kind: type) -> tuple[str | None, str | None]:
    """Return the class of Transformers that loads models of a class, if there is one, and their task on the hub."""
    name = kind.__name__
    for auto_class, table, task in _AUTO_CLASSES:
        classes = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {})
        if any(name == each or (isinstance(each, tuple) and name in each) for each in classes.values()):
            return auto_class, task
    return (name if kind.__module__.startswith("transformers.") else None), None


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
