"""Read what a run without a result file has recorded: it was interrupted, has not ended yet, or the file is lost."""

from ..errors import DataError, OutputWarning, warn_user
from ..runtime.run_dir import RunDir
from .ledger import Ledger
from .ledger_file import LedgerFile
from .run_record import RunRecord


def read_without_result(run_dir: RunDir) -> tuple[Ledger, RunRecord] | None:
    """Return the ledger and the record of a run that has no result file; None if it has one.

    Raises:
        DataError: if the run has not completed an update yet; or if it has finished, but its result file is missing and
            its ledger or record is damaged.

    Warns:
        OutputWarning: if the ledger is damaged before its last line.
    """
    record = RunRecord.read(run_dir.record)
    if record is None:
        if run_dir.record.is_file() and not run_dir.result.is_file():
            raise _unreadable(run_dir, "`run.json` is not a complete record")
        return None
    if _has_result(run_dir, record):
        return None
    found = LedgerFile.read(run_dir.ledger)
    if record.finished and (found.damage or not found.ledger.windows):
        raise _unreadable(run_dir, found.damage or "`ledger.jsonl` is missing or has no updates")
    n_updates, is_damaged = len(found.ledger.windows), bool(found.damage) and not found.ends_there
    if not n_updates and not is_damaged:
        raise DataError(f"The run in {str(run_dir.path)!r} has not completed an update yet, so it has no result.")
    if not n_updates:
        raise _unreadable(run_dir, found.damage)
    if is_damaged:
        warn_user(
            f"In {str(run_dir.path)!r}, {found.damage}. The result ends there, after update {n_updates:,}. Resume the "
            "run from a checkpoint (`--resume auto`), which writes the ledger again.",
            OutputWarning,
        )
    return found.ledger, record


def _has_result(run_dir: RunDir, record: RunRecord) -> bool:
    """Return whether the folder has the result of this run, and not only that of an older one."""
    if not run_dir.result.exists():
        return False
    return record.finished or run_dir.result.stat().st_mtime_ns > run_dir.record.stat().st_mtime_ns


def _unreadable(run_dir: RunDir, problem: str) -> DataError:
    return DataError(
        f"The run in {str(run_dir.path)!r} has no `result.json`, and {problem}. Restore one of these files from a "
        "copy, or resume the run from a checkpoint (`--resume auto`), which writes all of them again."
    )
