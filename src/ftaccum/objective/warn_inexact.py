"""The errors and warnings about a loss that was measured to be inexact."""

from collections.abc import Callable, Sequence

from ..errors import InexactLossError, InexactLossWarning, PaddingWarning, warn_user
from .report import ExactnessReport


def warn_if_inexact(
    report: ExactnessReport,
    on_inexact: str,
    *,
    is_main: bool,
    known: Sequence[str] = (),
    rephrase: Callable[[str], str] = lambda sentence: sentence,
) -> None:
    """Raise or warn if accumulating a loss only approximates one large batch; warn if padding counts in it.

    Args:
        on_inexact: "error", "warn" or "ignore".
        is_main: whether this process warns. All of them raise.
        rephrase: names the arguments of the caller's API in a sentence.
        known: reasons why it is inexact that need no measurement.

    Raises:
        InexactLossError: if the loss is inexact and `on_inexact` is "error".
    """
    sentences = [*known, *map(rephrase, report.inexact())]
    if sentences and on_inexact == "error":
        raise InexactLossError([*sentences, "Set `on_inexact='warn'` to train anyway."])
    if not is_main or on_inexact == "ignore":
        return
    for sentence in sentences:
        warn_user(sentence, InexactLossWarning)
    if padding := report.padding():
        warn_user(rephrase(padding), PaddingWarning)
