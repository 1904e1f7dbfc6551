"""The other processes of a run: telling that one of them is gone from a fault of one's own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.distributed import DistError

from ..errors import LostProcessError


@contextmanager
def report_lost_process(alone: bool, describe: Callable[[], str]) -> Iterator[None]:
    """Where a collective fails because another process is gone, says so.

    Args:
        alone: whether there are no others.
        in_words: where that was and what is kept of the run, in sentences; called when it has happened.

    Raises:
        LostProcessError: in place of what the collective said.
    """
    try:
        yield
    except LostProcessError:
        raise
    except Exception as error:
        heard = None if alone else _of_others(error)
        if heard is None:
            raise
        raise LostProcessError(
            f"Another process of this run has ended or does not answer, and it cannot go on without. {describe()} What "
            f"was heard of it: {heard}"
        ) from error


def _of_others(error: BaseException | None) -> BaseException | None:
    """What a collective said, if that is behind an error: whoever tries something out takes it for its own failure."""
    while error is not None and not _by_collective(error):
        error = error.__cause__
    return error


def _by_collective(error: BaseException) -> bool:
    said = str(error)
    words = "gloo" in said or "NCCL" in said or "onnection closed by peer" in said
    return isinstance(error, DistError) or (type(error) is RuntimeError and words)
