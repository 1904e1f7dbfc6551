"""Write a model and its tokenizer into a folder."""

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import save_model as save_weights
from torch import distributed

from ..errors import SettingsError
from ..insight.run_metadata import RunMetadata
from ..runtime.adapters import is_peft_model, merged_copy
from ..runtime.atomic_files import atomic_directory
from ..runtime.log import logger
from ..runtime.model_wrapper import model_to_save, trained_besides
from ..runtime.process_group import lasting_process_group
from ..runtime.sharding.tensors import is_sharded
from ..runtime.sharding.whole_weights import whole_weights
from .generation_settings import save_pretrained
from .saved_model import ADAPTER, write_card

MODEL_CONFIG = "model_config.json"  # beside it: the configuration of the trained model, with its labels

_CANNOT_MERGE = (
    "`merge` is True, but the model is sharded over the processes, and adapters are merged only into whole weights. "
    "Leave `merge` out, and run `ftaccum merge` on the saved folder."
)


def save_model(
    model: Any, tokenizer: Any, folder: Path, *, merges: bool = False, metadata: RunMetadata | None = None
) -> None:
    """Save a model and its tokenizer, if any, in the form that `from_pretrained` and `pipeline` read.

    Of a `ModelWrapper`, save the model inside. An existing folder is replaced only when the new one is complete.

    Args:
        merges: whether to save a PEFT model as a plain model, with its adapters merged.
        metadata: what the model card says of the run; None writes no card.

    Raises:
        ValueError: if a merged weight is not finite.
    """
    inner = model_to_save(model)
    if unsaved := trained_besides(model):
        logger.warning(
            f"The weights besides `model` of the wrapper ({unsaved[0]}, {len(unsaved)} in all) were trained, but are "
            "not saved with the model. Checkpoints have them; `torch.save` saves them on their own."
        )
    saved: Any = merged_copy(inner) if merges else inner
    with atomic_directory(folder) as partial:
        if hasattr(saved, "save_pretrained"):
            with warnings.catch_warnings():
                # Of older versions of PEFT, about a base model without a name.
                warnings.filterwarnings("ignore", message="Could not find a config file in  - will assume")
                save_pretrained(saved, partial)
        else:
            save_weights(saved, str(partial / "model.safetensors"))
        if is_peft_model(saved) and hasattr(saved.config, "to_json_file"):
            # Not as `config.json`, which would make Transformers take the folder for a whole model.
            config = copy.deepcopy(saved.config)
            config.architectures = [type(saved.get_base_model()).__name__]
            config.to_json_file(partial / MODEL_CONFIG)
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(partial)
        elif tokenizer is not None:
            logger.warning(f"`tokenizer` ({type(tokenizer).__name__}) has no `save_pretrained`, so it is not saved.")
        if metadata is not None:
            write_card(saved, metadata, partial, folder.absolute().name)


def remove_adapter(folder: Path) -> None:
    """Remove a folder of adapters, if there is one."""
    if (folder / ADAPTER).exists():
        shutil.rmtree(folder, ignore_errors=True)


def save_on_main(
    model: Any, tokenizer: Any, folder: Path, *, merges: bool, metadata: RunMetadata | None = None
) -> None:
    """Save a model as `save_model` does, on the main process only. If the model is sharded, all processes call this.

    Raises:
        SettingsError: if the adapters of a sharded model are to be merged.
        Exception: whatever saving raises: on the main process, and also on the others if the model is sharded.
    """
    if not is_sharded(model):
        if _is_main_process():
            save_model(model, tokenizer, folder, merges=merges, metadata=metadata)
        return
    if merges:
        raise SettingsError([_CANNOT_MERGE])
    process_group = lasting_process_group(distributed.get_world_size())
    with whole_weights(model, folder.absolute().parent, process_group) as weights:

        def save() -> None:
            with weights.in_model():
                save_model(model, tokenizer, folder, merges=merges, metadata=metadata)

        process_group.run_on_main(save)


def _is_main_process() -> bool:
    """Return whether this is the first process that a launcher started, or the only one."""
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
