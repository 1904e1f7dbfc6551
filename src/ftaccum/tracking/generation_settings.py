"""Save a model whatever its settings for generation are. Transformers saves no weights if it finds these invalid."""

import copy
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ..runtime.log import logger
from ..runtime.temporary_attribute import temporary_attribute

_FILE = "generation_config.json"


def save_pretrained(model: Any, folder: Path) -> None:
    """Call a model's `save_pretrained`, and save its settings for generation even if Transformers refuses them.

    Settings that belong into `generation_config` but are in the model's `config` are saved as the former. Invalid
    settings are saved as they are, apart from one with which Transformers could not load the model. All of this logs a
    warning. The model itself stays as it is.
    """
    generation = getattr(model, "generation_config", None)
    if not isinstance(generation, GenerationConfig) or not model.can_generate():
        model.save_pretrained(folder)
        return
    try:
        model.save_pretrained(folder)
    except (ValueError, TypeError):
        config, misplaced = _without_generation(model.config)
        values = copy.deepcopy(generation)
        values.__dict__.update(misplaced)
        with ExitStack() as stack:
            stack.enter_context(temporary_attribute(model, "config", config))
            stack.enter_context(temporary_attribute(model, "generation_config", GenerationConfig()))
            model.save_pretrained(folder)  # raises the error again, if it has another cause
        if misplaced:
            logger.warning(
                f"`model.config` has settings for generation, which Transformers does not save there: {misplaced}. "
                f"They are saved in {_FILE} instead."
            )
        _write(values, folder / _FILE)
    else:
        if not (folder / _FILE).exists() and _can_be_loaded(generation):  # PEFT saves only its adapters
            generation.to_json_file(folder / _FILE)


def _write(values: GenerationConfig, file: Path) -> None:
    """Write generation settings to a file. If they are invalid, log a warning."""
    fault = _fault_of(values)
    if _can_be_loaded(values):
        saved = f"They are saved as they are: correct them in {_FILE}, or Transformers may ignore them."
    else:
        values, removed = _repair(values)
        saved = f"Transformers could not load them, so {_FILE} does not have {removed}."
    values.to_json_file(file)
    if fault is not None:
        logger.warning(f"Transformers finds settings in `model.generation_config` invalid ({fault}). {saved}")


def _fault_of(values: GenerationConfig) -> str | None:
    """Return what Transformers finds wrong with generation settings, in one line; None if they are valid."""
    try:
        values.validate(strict=True)
        values.to_json_string()
    except (ValueError, TypeError) as error:
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
        return (lines[1] if len(lines) > 1 else lines[0]).rstrip(".")
    return None


def _can_be_loaded(values: GenerationConfig) -> bool:
    try:
        GenerationConfig.from_dict(json.loads(values.to_json_string()))
    except (ValueError, TypeError):
        return False
    return True


def _repair(values: GenerationConfig) -> tuple[GenerationConfig, dict[str, Any]]:
    """Return generation settings that can be loaded, and those that they are without: one if possible, or else all."""
    given = values.to_diff_dict()
    for name, value in given.items():
        repaired = copy.deepcopy(values)
        setattr(repaired, name, None)
        if _can_be_loaded(repaired):
            return repaired, {name: value}
    return GenerationConfig(), given


def _without_generation(config: Any) -> tuple[Any, dict[str, Any]]:
    """Return a copy of a model's config without settings for generation, and these settings.

    Settings that the config's class itself declares are no settings for generation.
    """
    copied, declared = copy.deepcopy(config), vars(type(config)()).keys()
    found = GenerationConfig().to_dict().keys() & vars(config).keys() - declared
    return copied, {name: value for name in sorted(found) if (value := copied.__dict__.pop(name)) is not None}
