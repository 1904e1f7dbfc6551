"""The check that a folder is the output folder of a run, for commands that read one."""

from pathlib import Path

from ..errors import SettingsError
from ..runtime.run_dir import RunDir


def check_run_folder(folder: Path) -> None:
    """Raise SettingsError if a folder is not the output folder of a run."""
    remedy = "Give the output folder of a run."
    if not folder.is_dir():
        raise SettingsError([f"There is no folder {str(folder)!r}. {remedy}"])
    run_dir = RunDir(folder)
    if run_dir.result.is_file() or run_dir.record.is_file():
        return
    if (folder / "trials").is_dir():
        remedy = "It is that of a search, which has written its own `report.html`. Give folders in `trials`."
    raise SettingsError(
        [f"{str(folder)!r} has no `result.json` and no `run.json`, so it is not the output folder of a run. {remedy}"]
    )
