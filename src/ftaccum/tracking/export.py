"""Write the files of a finished run into its folder, and describe those that cannot be written."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import nn

from ..errors import OutputWarning, warn_user
from ..insight.format import format_bytes
from ..runtime.process_group import ProcessGroup
from ..runtime.run_dir import RunDir
from ..runtime.sharding.tensors import is_sharded
from ..runtime.sharding.whole_weights import WholeWeights, whole_weights
from .ledger import Ledger
from .model_files import remove_adapter, save_model
from .result import Result
from .trained_model import TrainedModel

_WHOLE = ". The trained model is still in memory: save it to another place."
_SHARDED = (
    ", and twice that while a sharded model is saved. The trained model is still in the memory of its processes: "
    "`save_model` of the result saves it to another place if all of them call it. The same run with `resume='auto'` "
    "continues from the newest checkpoint, if there is one."
)


def write_outputs(
    result: Result,
    ledger: Ledger,
    trained: TrainedModel | None,
    run_dir: RunDir | None,
    process_group: ProcessGroup,
) -> Result:
    """Complete the ledger and write the model and the result, if the run has a folder.

    This raises no errors: training is done, and a failed write must cost neither its result nor the model in memory.
    Old files stay until their replacements are on the disk. All processes call this, as they gather a sharded model
    together.

    Args:
        trained: the model to save, or None to save none.

    Returns:
        the result on all processes, with a sentence in `unwritten` for each output that could not be written.

    Warns:
        OutputWarning: for each output that could not be written.
    """
    if run_dir is None:
        return result
    with _whole(trained, run_dir, process_group) as write:
        faults = process_group.run_on_main(lambda: _write(result, ledger, write, run_dir))
    if process_group.is_main:
        for fault in faults:
            warn_user(fault, OutputWarning)
    return replace(result, unwritten=faults)


def write_model(trained: TrainedModel, run_dir: RunDir, process_group: ProcessGroup) -> list[str]:
    """Write the model into the folder of a run. If that fails, return sentences about it, on all processes.

    All processes call this.
    """
    with _whole(trained, run_dir, process_group) as write:
        return process_group.run_on_main(write)


@contextmanager
def _whole(
    trained: TrainedModel | None, run_dir: RunDir, process_group: ProcessGroup
) -> Iterator[Callable[[], list[str]]]:
    """Gather a sharded model on all processes. Yield a function that writes the model on the main process, if any."""
    if trained is None:
        yield list
        return
    with whole_weights(trained.model, run_dir.path, process_group) as weights:
        yield lambda: _write_model(trained, run_dir, weights)


def _write(result: Result, ledger: Ledger, write_model: Callable[[], list[str]], run_dir: RunDir) -> list[str]:
    """Return a sentence for each output that could not be written."""
    faults = _tried(run_dir.ledger, lambda _: ledger.write(), "The result also has its losses, norms and audits.")
    faults += write_model()
    write = replace(result, unwritten=faults).save
    return faults + _tried(run_dir.result, write, "The call still returns the result: its `save` writes it elsewhere.")


def _write_model(trained: TrainedModel, run_dir: RunDir, weights: WholeWeights) -> list[str]:
    model, tokenizer, metadata = trained.model, trained.tokenizer, trained.metadata
    remedy = f"The weights take {format_bytes(_bytes_of(model))}{_SHARDED if is_sharded(model) else _WHOLE}"
    merges = trained.save != "adapter"

    def write(path: Path) -> None:
        with weights.in_model():
            save_model(model, tokenizer, path, merges=merges, metadata=metadata)

    faults = _tried(run_dir.model, write, remedy)
    if trained.save == "both":
        local = None if metadata is None else replace(metadata, repository=None)  # only `model` is uploaded
        return faults + _tried(run_dir.adapter, lambda path: save_model(model, tokenizer, path, metadata=local), remedy)
    if not faults:
        remove_adapter(run_dir.adapter)  # of an earlier run
    return faults


def _tried(path: Path, write: Callable[[Path], None], remedy: str) -> list[str]:
    try:
        write(path)
    except Exception as error:  # on a full disk, Safetensors and tokenizers raise errors of their own types
        why = f"{type(error).__name__}: {error}."
        return [" ".join([f"{str(path)!r} cannot be written: {why}", *_there_now(path), remedy])]
    return []


def _there_now(path: Path) -> list[str]:
    """Return sentences on the free space and the old file at a path that could not be written.

    Return none if the path cannot be examined: the working folder or a network file system may be gone.
    """
    try:
        free = f"{format_bytes(_free_at(path))} are free there."
        return [free, "An earlier version is still there."] if path.exists() else [free]
    except OSError:
        return []


def _bytes_of(model: nn.Module) -> int:
    """Return the bytes of all weights and buffers. Tied weights count once, as in `parameters`."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def _free_at(path: Path) -> int:
    return shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.exists())).free
