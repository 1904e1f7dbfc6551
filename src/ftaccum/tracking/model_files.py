"""Write a model and its tokenizer into a folder."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_model as save_weights
from torch import distributed

from ..runtime.atomic_files import atomic_directory


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save a model and its tokenizer, if any, in the form that `from_pretrained` and `pipeline` read.

    An existing folder is replaced only when the new one is complete.
    """
    with atomic_directory(folder) as partial:
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(partial)
        else:
            save_weights(model, str(partial / "model.safetensors"))
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)


def is_main_process() -> bool:
    """Return whether this is the first process that a launcher started, or the only one."""
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
