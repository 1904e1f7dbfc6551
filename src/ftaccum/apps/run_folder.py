"""The check that a folder is the output folder of a run, for commands that read one."""

from pathlib import Path

from ..runtime.run_dir import RunDir


def find_fault(folder: Path) -> str | None:
    """Return a sentence that says why a folder is not the output folder of a run; None if it is."""
    if not folder.is_dir():
        return f"There is no folder {str(folder)!r}. Give the output folder of a run."
    run_dir = RunDir(folder)
    if run_dir.result.is_file() or run_dir.record.is_file():
        return None
    problem = f"{str(folder)!r} has no `result.json` and no `run.json`, so it is not the output folder of a run."
    if (folder / "trials").is_dir():
        return f"{problem} It is that of a search, which has written its own `report.html`. Give folders in `trials`."
    return f"{problem} Give the output folder of a run."
