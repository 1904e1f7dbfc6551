"""Warnings that count rows and name the first."""

from collections.abc import Sequence

from ..errors import TextWarning, warn_user
from ..runtime.accelerator import is_first_process


def warn_of_rows(argument: str, flagged: Sequence[bool], sentence: str) -> None:
    """Warn once about the flagged rows, if there are any, on the first process only.

    Args:
        argument: the argument that names the rows.
        flagged: for each row, whether the warning is about it.
        sentence: what is the matter with them, after "3 of 9 rows (the first is row 4)".

    Warns:
        TextWarning: if any row is flagged.
    """
    found = [position for position, is_flagged in enumerate(flagged) if is_flagged]
    if found and is_first_process():
        rows = f"{len(found)} of {len(flagged)} rows (the first is row {found[0]})"
        warn_user(f"In `{argument}`, {rows} {sentence}", TextWarning)
