"""Build a model from its config alone, on the meta device: shapes and types of its weights, but no values."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel

from ...errors import SettingsError, first_line
from ...tasks.task_classes import task_class


def model_without_weights(name: str, task: str | None, dtype: str) -> Any:
    """Return a model on the meta device, as `from_pretrained` would build it. No weights are loaded or downloaded.

    Args:
        name: folder or hub name of the model.
        task: the kind of task, which decides the head; None for the class that the config names.
        dtype: the type of the weights; "auto" for that of the config, or float32 if it has none.

    Raises:
        SettingsError: if the config cannot be loaded, or makes no model.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # libraries may raise anything
        is_missing = name.startswith(("/", ".", "~")) and not Path(name).exists()
        reason = "there is no such folder" if is_missing else first_line(error)
        remedy = "Give a folder that `save_pretrained` wrote, or a hub model."
        raise SettingsError([f"`model` {name!r} has no config that can be loaded: {reason}. {remedy}"]) from error
    if getattr(config, "quantization_config", None) is not None:
        raise SettingsError([f"`model` {name!r} has quantized weights, whose memory is not estimated."])
    try:
        return model_of_config(config, task, dtype)
    except Exception as error:
        wanted = f" with the head of the task {task!r}" if task else ""
        raise SettingsError([f"`model` {name!r} cannot be built{wanted}: {first_line(error)}."]) from error


def model_of_config(config: Any, task: str | None = None, dtype: str = "auto") -> Any:
    """Return a model on the meta device.

    Args:
        config: a config of Transformers.
        task, dtype: as in `model_without_weights`.
    """
    asked = getattr(config, "dtype", None) if dtype == "auto" else dtype
    kind = getattr(torch, asked) if isinstance(asked, str) else asked or torch.float32
    config = copy.deepcopy(config)
    config.dtype = kind  # which older versions of Transformers prefer to the argument below
    with torch.device("meta"), _default_dtype(kind):
        if task is not None:
            return task_class(task).model_class.from_config(config, dtype=kind)
        own = getattr(transformers, (config.architectures or [""])[0], None)
        return AutoModel.from_config(config, dtype=kind) if own is None else own(config)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
