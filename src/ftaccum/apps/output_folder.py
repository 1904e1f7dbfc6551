"""The output folder of `ftaccum train`: a new one named after the model, the data and the date, or one to resume."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any

from ..checkpoint.compatibility import recipe_identity, size_identity
from ..errors import SettingsError
from ..planning.batch_size import batch_sizes_of
from ..runtime.accelerator import launched_processes
from ..runtime.run_dir import RunDir
from ..settings.recipe import Recipe
from ..settings.runtime import Runtime
from ..tasks.arguments import TrainArguments
from ..tasks.reading.data_file import DataFile
from ..tracking.run_record import Command, RunRecord
from .typed_command import resume_command

OUTPUTS = "outputs"  # the folder of the output folders that the user has not named
_LONGEST = 60  # characters of a name


@contextmanager
def output_folder(
    named: TrainArguments, lora: dict[str, Any] | None, recipe: Recipe, runtime: Runtime, words: Sequence[str]
) -> Iterator[tuple[str, Command]]:
    """Choose the output folder of a run, on all processes together. If a new one stays empty, remove it on exit.

    Args:
        lora: the argument of `test_fine_tuning`.
        words: the options of the command as typed.

    Yields:
        the folder, and the command line for the run's banner and record.

    Raises:
        SettingsError: if the folder cannot be created, or the sizes of an update contradict each other.
    """
    folder, note, is_main = runtime.output_dir, "", False
    sources = vars(named) | {"lora": lora}
    if folder is None:
        with launched_processes() as processes:
            is_main = processes.is_main
            folder, note = processes.run_on_main(lambda: _choose(sources, recipe, runtime, processes.size))
    made = Path(folder).absolute()
    try:
        yield folder, Command(sources, resume_command(words, runtime, folder), note)
    finally:
        if is_main:
            with suppress(OSError):  # it is not empty, or not there
                made.rmdir()


def default_name(model: str, data: str) -> str:
    """Return a name for the output folder of a model and data: the last components of their paths, and today's date."""
    path = Path(data.partition(",")[0])
    file = DataFile(path, "")
    names = [model, str(path).removesuffix("".join(path.suffixes)) if file.kind else str(path)]
    return "-".join([*map(_safe, names), date.today().isoformat()])


def _safe(name: str) -> str:
    """Return the last component of a path with characters that every file system and shell accepts."""
    last = os.path.basename(os.path.abspath(name))
    return re.sub(r"[^A-Za-z0-9._]+", "-", last).strip("-.")[:_LONGEST] or "unnamed"


def _choose(sources: Mapping[str, Any], recipe: Recipe, runtime: Runtime, num_processes: int) -> tuple[str, str]:
    """Return the folder of the run to resume, or a new one; and a sentence on the choice if the run asks to resume."""
    if runtime.resume != "auto":
        return _new_folder(sources), ""
    found = _newest_unfinished(sources, recipe, runtime, num_processes)
    if found is not None:
        unfinished, record = found
        since = record.started_at.replace("T", " ").partition(".")[0]
        return str(unfinished), f"Resuming the newest unfinished run with these settings: {unfinished}, of {since} UTC."
    folder = _new_folder(sources)
    return folder, f"There is no unfinished run with these settings in {OUTPUTS!r}. Starting a new one in {folder!r}."


def _new_folder(sources: Mapping[str, Any]) -> str:
    """Create a folder that no other run uses, and return its path."""
    name = default_name(sources["model"], sources["train_data"])
    folder, n = Path(OUTPUTS, name), 1
    while True:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.exists():  # `OUTPUTS` is a file
                raise _refused(folder, f"{OUTPUTS!r} is not a folder") from None
            n += 1
            folder = Path(OUTPUTS, f"{name}-{n}")
        except OSError as error:
            raise _refused(folder, error) from error
        else:
            return str(folder)


def _refused(folder: Path, why: object) -> SettingsError:
    return SettingsError([f"The output folder {str(folder)!r} cannot be created: {why}. Give another `--output_dir`."])


def _newest_unfinished(
    sources: Mapping[str, Any], recipe: Recipe, runtime: Runtime, num_processes: int
) -> tuple[Path, RunRecord] | None:
    """Return the folder and the record of the newest unfinished run with these settings, if any."""
    records = [(file.parent, RunRecord.read(file)) for file in Path(OUTPUTS).glob(f"*/{RunDir(Path()).record.name}")]
    found = [
        (folder, record)
        for folder, record in records
        if record is not None and not record.finished and _is_same(record, sources, recipe, runtime, num_processes)
    ]
    idle = [one for one in found if not RunDir(one[0].absolute()).is_locked()]
    return max(idle, key=lambda one: one[1].started_at, default=None)


def _is_same(
    record: RunRecord, sources: Mapping[str, Any], recipe: Recipe, runtime: Runtime, num_processes: int
) -> bool:
    """Return whether a run has these settings, apart from those that `allow_changed` names and its Runtime."""
    allowed = set(runtime.allow_changed)
    was = {"lora": None} | record.recipe | record.sources
    now = recipe_identity(recipe) | _as_json(sources)
    if {name for name in now if name not in was or was[name] != now[name]} - allowed:
        return False
    if "effective_batch_size" in allowed:
        return True
    if recipe.tokens_per_update or record.tokens_per_update:
        return recipe.tokens_per_update == record.tokens_per_update
    batch_size = runtime.batch_size if isinstance(runtime.batch_size, int) else 1  # "auto" does not set the update
    return size_identity(batch_sizes_of(recipe, batch_size, num_processes)) == size_identity(record.batch_sizes())


def _as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as a record has them, which is JSON."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
