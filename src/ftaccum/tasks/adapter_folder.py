"""Find a folder of adapters in a run's output folder, and load it with its base model."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, PreTrainedModel

from ..errors import SettingsError, listed
from ..insight.model_card import CARD
from ..runtime.adapters import fully_trained_modules
from ..runtime.library_output import library_bars, load_report_withheld
from ..runtime.run_dir import RunDir
from ..tracking.auto_classes import auto_class_of_adapters
from ..tracking.model_files import MODEL_CONFIG
from ..tracking.saved_model import ADAPTER

_LABELS = ("id2label", "label2id", "problem_type")
_NOT_COPIED = ("adapter_", "model_config.json", CARD)  # all other files belong to the tokenizer


def find_adapter(run: str) -> Path:
    """Return the folder of the adapters of a run.

    Args:
        run: the output folder of a run, its `model` or `adapter` folder, or any folder that PEFT has saved.

    Raises:
        SettingsError: if there are no adapters.
    """
    given = Path(run).expanduser()
    run_dir = RunDir(given)
    places = [given, run_dir.adapter, run_dir.model]
    if (found := next((place for place in places if (place / ADAPTER).is_file()), None)) is not None:
        return found
    if not given.is_dir():
        raise SettingsError([f"There is no folder {run!r}. Give the output folder of a run, or a folder of adapters."])
    plain = next((place for place in (run_dir.model, given) if (place / "config.json").is_file()), None)
    if plain is not None:
        raise SettingsError([f"{str(plain)!r} is a plain model without adapters, so there is nothing to merge."])
    raise SettingsError(
        [f"{run!r} contains no adapters: there is no file {ADAPTER!r} in it, in `adapter/` or in `model/`."]
    )


def load_with_base(folder: Path, base: str | None = None) -> Any:
    """Return the PEFT model of a folder of adapters: the base model that they were trained on, with the adapters.

    Args:
        folder: the folder of the adapters.
        base: the base model, by name or folder; None takes the one that the adapters name.

    Raises:
        SettingsError: if the base model or the adapters cannot be loaded, or do not belong together.
    """
    adapter = _read_json(folder / ADAPTER)
    name = base or adapter.get("base_model_name_or_path")
    if not name:
        raise SettingsError(
            [f"The adapters in {str(folder)!r} do not name their base model. Give its name or folder as `--base`."]
        )
    saved = _read_json(folder / MODEL_CONFIG) if (folder / MODEL_CONFIG).is_file() else {}
    model, new = _load_base(name, adapter, saved)
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
            # An evaluation measures gradients first, and so needs weights that can be trained.
            loaded = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except Exception as error:  # PEFT raises errors of many types
        raise SettingsError(
            [f"The adapters in {str(folder)!r} do not fit the base model {name!r}: {error} Give theirs as `--base`."]
        ) from error
    replaced = tuple(f"{module}." for module in fully_trained_modules(loaded))
    if missing := [weight for weight in new if not weight.startswith(replaced)]:
        raise SettingsError(
            [
                f"The base model {name!r} lacks the weights {listed(missing, 4)}, and the adapters in "
                f"{str(folder)!r} do not have them either. Give the base model that they were trained on as `--base`."
            ]
        )
    return loaded


def save_tokenizer(folder: Path, target: Path, base: str | None) -> None:
    """Copy the files of the tokenizer from a folder of adapters; without any, save the tokenizer of the base model."""
    files = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(_NOT_COPIED)]
    for file in files:
        shutil.copy2(file, target / file.name)
    if any(file.name.startswith(("tokenizer", "vocab", "preprocessor", "processor")) for file in files):
        return
    name = base or _read_json(folder / ADAPTER).get("base_model_name_or_path")
    try:
        AutoTokenizer.from_pretrained(name).save_pretrained(target)
    except (OSError, ValueError):
        return  # a model without a tokenizer


def _load_base(name: str, adapter: dict[str, Any], saved: dict[str, Any]) -> tuple[PreTrainedModel, list[str]]:
    """Return the base model with the head that was trained, and the names of its new weights."""
    kind = _class_of(adapter, saved)
    labels = {key: saved[key] for key in _LABELS if saved.get(key) is not None}
    if "id2label" in labels:
        labels["id2label"] = {int(number): label for number, label in labels["id2label"].items()}
    try:
        with load_report_withheld(), library_bars(shown=False):
            model, report = kind.from_pretrained(
                name,
                revision=adapter.get("revision") or "main",
                ignore_mismatched_sizes=bool(labels),  # the adapters have the head
                output_loading_info=True,
                **labels,
            )
    except Exception as error:
        raise SettingsError(
            [f"The base model {name!r} of the adapters cannot be loaded: {error} Give its name or folder as `--base`."]
        ) from error
    if getattr(model, "is_quantized", False):
        raise SettingsError(
            [
                f"The base model {name!r} is quantized, so merging would round the adapters. Give it with its full "
                "weights as `--base`."
            ]
        )
    size = saved.get("vocab_size")
    if isinstance(size, int) and model.get_input_embeddings().weight.shape[0] != size:
        model.resize_token_embeddings(size)
    if saved.get("pad_token_id") is not None:  # that of the tokenizer, by which classifiers find the last token
        model.config.pad_token_id = saved["pad_token_id"]
    return model, sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})


def _class_of(adapter: dict[str, Any], saved: dict[str, Any]) -> Any:
    """Return the class of the base model: that of the trained model if it is known, or else one of its task."""
    for name in saved.get("architectures") or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    task = adapter.get("task_type")
    if (auto_class := auto_class_of_adapters(task)) is None:
        raise SettingsError(
            [
                f"The adapters name no class of their base model, and their task is {task!r}. Load the base model in "
                "Python, and merge them with `peft.PeftModel.from_pretrained(model, folder).merge_and_unload()`."
            ]
        )
    return getattr(transformers, auto_class.name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text())
        if isinstance(read, dict):
            return read
        raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise SettingsError([f"{str(path)!r} cannot be read: {error}. Copy or save the adapters again."]) from error
