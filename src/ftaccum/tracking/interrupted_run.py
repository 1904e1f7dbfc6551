"""Read what a run has recorded so far, if it was interrupted or has not ended yet."""

from pathlib import Path

from ..errors import DataError
from ..runtime.run_dir import RunDir
from .ledger import Ledger
from .run_record import RunRecord


def read_interrupted(run_dir: RunDir) -> tuple[Ledger, RunRecord] | None:
    """Return the ledger and the record of a run that has not ended; None if it has.

    Raises:
        DataError: if the run has not completed an update yet.
    """
    record = RunRecord.read(run_dir.record)
    if record is None or record.finished or _is_newer(run_dir.result, run_dir.record):
        return None
    ledger = Ledger.read(run_dir.ledger)
    if not ledger.windows:
        raise DataError(f"The run in {str(run_dir.path)!r} has not completed an update yet, so it has no result.")
    return ledger, record


def _is_newer(path: Path, other: Path) -> bool:
    """Return whether a file exists and was written after another one."""
    return path.exists() and path.stat().st_mtime_ns > other.stat().st_mtime_ns
