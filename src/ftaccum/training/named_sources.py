"""The model and the data of a run, under names that may be published."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..errors import DataError
from ..insight.run_metadata import Named, named_model, public_name
from ..runtime.adapters import is_peft_model
from ..runtime.model_wrapper import model_to_save
from ..tasks.reading.sources import find_source
from .config import RunConfig

_ON_HUB = re.compile(r"hf://datasets/([^@]+)@")
_RANDOM = [Named("random tokens")]
_LISTED = 5  # files of a data set


def base_model(config: RunConfig) -> Named | None:
    """Return the model that is fine-tuned; None if it has no name."""
    return named_model(_sources(config).get("model") or _loaded_from(config.components.model))


def training_data(config: RunConfig, *, is_synthetic: bool) -> Sequence[Named]:
    """Return the training data, if they have names."""
    if is_synthetic:
        return _RANDOM
    return _named(_sources(config).get("train_data"), "train") or name_of_dataset(config.components.train_data)


def validation_data(config: RunConfig) -> Sequence[Named]:
    """Return the validation data, if they have names."""
    return _named(_sources(config).get("val_data"), "validation") or name_of_dataset(config.components.val_data)


def describe_subject(config: RunConfig, n_rows: int | None, *, is_synthetic: bool) -> str:
    """Return the model and the data of a run as a short text.

    Args:
        config: the configuration of the run.
        n_rows: number of training rows; None for a stream.
        is_synthetic: whether the rows are random.
    """
    base, data = base_model(config), training_data(config, is_synthetic=is_synthetic)
    model = type(config.components.model).__name__ if base is None else base.name
    on = f" on {', '.join(each.name for each in data)}" if data else ""
    return f"{model}{on}" + ("" if n_rows is None else f", {n_rows:,} training rows")


def _sources(config: RunConfig) -> Mapping[str, Any]:
    return {} if config.command is None else config.command.sources


def _loaded_from(model: Any) -> str | None:
    """Return the name or the folder that a model was loaded from; None if it was not loaded."""
    model = model_to_save(model)
    if is_peft_model(model):
        return getattr(next(iter(model.peft_config.values())), "base_model_name_or_path", None)
    return getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)


def _named(sources: str | None, split: str) -> list[Named]:
    """Return the data that an option of the command line names."""
    named = []
    for name in (sources or "").split(","):
        if name := name.strip():
            with suppress(DataError):  # the file is gone
                source = find_source(name, split, "train_data")
                if source.kind == "hub":
                    named.append(Named(source.name, on_hub=True, config=source.config, split=source.split))
                    continue
            named.append(Named(public_name(name)))
    return named


def name_of_dataset(data: Any) -> list[Named]:
    """Return the name of a data set of `datasets`: that on the hub, those of its files, or that of its folder.

    The name of a builder that reads files, such as "json", says nothing of the data.
    """
    info = getattr(data, "info", None)
    addresses = [str(address) for address in getattr(info, "download_checksums", None) or ()]
    hub = {match[1] for address in addresses if (match := _ON_HUB.match(address))}
    if hub:
        config, split = getattr(info, "config_name", None), getattr(data, "split", None)
        config = None if config == "default" else config
        return [Named(name, on_hub=True, config=config, split=str(split) if split else None) for name in sorted(hub)]
    name = getattr(info, "dataset_name", None)
    name = None if name == getattr(info, "builder_name", None) else name
    files = sorted({public_name(address) for address in addresses}) or ([public_name(name)] if name else [])
    return [Named(file) for file in files[:_LISTED]] + ([Named("…")] if len(files) > _LISTED else [])
