"""Write the adapters of a run and their base model as one plain model."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import SettingsError
from ..fields import Text, setting

_merge = partial(setting, group="merging")


@dataclass
class MergeArguments:
    """The options of `ftaccum merge`."""

    output: Text = _merge("", "folder to write the model to; it must be new or empty (required)")
    base: Text | None = _merge(None, "name or folder of the base model; none: the one that the adapters name")


def merge_run(source: str, output: str, base: str | None) -> Path:
    """Merge the adapters of a run into their base model, and write a plain model. Return the folder of the adapters.

    Args:
        source: the output folder of a run, or a folder of adapters.
        output: the folder to write, new or empty.
        base: the base model, by name or folder; None takes the one that the adapters name.

    Raises:
        SettingsError: if there are no adapters, the base model cannot be loaded, a merged weight is not finite, or the
            folder cannot be written.
    """
    from ..training.adapters import fault_of_peft

    target = Path(output).expanduser()
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise SettingsError([f"`--output` is {output!r}, which is not empty. Give a new folder."])
    if fault := fault_of_peft("`ftaccum merge`"):
        raise SettingsError([fault])
    # These imports take seconds, so check the input first.
    from ..runtime.adapters import merged
    from ..runtime.atomic_files import atomic_directory
    from ..tasks.adapter_folder import find_adapter, load_with_base, save_tokenizer
    from ..tracking.saved_model import write_merged_card

    folder = find_adapter(source)
    try:
        model: Any = merged(load_with_base(folder, base))
    except ValueError as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError([f"The adapters in {str(folder)!r} cannot be merged: {error}"]) from error
    try:
        with atomic_directory(target) as partial_folder:
            model.save_pretrained(partial_folder)
            save_tokenizer(folder, partial_folder, base)
            write_merged_card(model, folder, base, partial_folder, target.absolute().name)
    except OSError as error:
        raise SettingsError([f"`--output` {output!r} cannot be written: {error}."]) from error
    return folder
