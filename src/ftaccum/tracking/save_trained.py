"""Save the trained model that a result has in memory."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SettingsError
from .trained_model import TrainedModel

if TYPE_CHECKING:
    from .result import Result


def save_trained(result: "Result", trained: TrainedModel | None, path: Path, *, merge: bool) -> None:
    """Write the trained model of a result, and its tokenizer if it has one, as `Result.save_model` does.

    Args:
        result: the result.
        trained: its model; None if it has none.
        path: the folder to write.
        merge: whether to write a PEFT model as a plain model, with its adapters merged.

    Raises:
        SettingsError: if there is no model, or if it has no adapters to merge.
    """
    if trained is None or trained.model is None:
        saved = f" The run saved its model in {str(Path(result.output_dir) / 'model')!r}." if result.output_dir else ""
        if result.interrupted:
            saved = " The run was interrupted, so it has saved no model yet. `resume='auto'` finishes it."
        raise SettingsError(
            [
                "`save_model` needs the trained model, but `model` is None: only the result that "
                f"`test_fine_tuning` returns has it, not one that was loaded, copied or unpickled.{saved}"
            ]
        )
    from ..runtime.model_wrapper import model_to_save  # these import torch
    from .model_files import save_on_main

    if merge and not hasattr(model_to_save(trained.model), "merge_and_unload"):
        raise SettingsError(["`merge` is True, but the model has no adapters to merge. Leave `merge` out."])
    metadata = trained.metadata
    local = None if metadata is None else replace(metadata, repository=None)  # it is not known to be uploaded there
    save_on_main(trained.model, trained.tokenizer, path, merges=merge, metadata=local)
