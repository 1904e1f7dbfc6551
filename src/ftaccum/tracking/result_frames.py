"""The histories of a result as pandas DataFrames."""

from typing import TYPE_CHECKING

from ..errors import SettingsError
from ..insight.curves import with_loss

if TYPE_CHECKING:
    import pandas as pd

    from .result import Result


def as_frame(result: "Result", kind: str) -> "pd.DataFrame":
    """Return a row per update ("updates") or per evaluation ("evaluations"), indexed by the number of updates so far.

    Raises:
        SettingsError: if `kind` is something else.
    """
    import pandas as pd  # slow to import

    if kind == "updates":
        numbers = pd.RangeIndex(1, len(result.loss_history) + 1, name="update")
        columns = {
            "loss": result.loss_history,
            "grad_norm": result.grad_norm_history,
            "learning_rate": result.lr_history,
        }
        return pd.DataFrame(columns, numbers)
    if kind == "evaluations":
        pairs = zip(result.val_loss_history, result.metrics, strict=True)
        rows = [with_loss(loss, metrics, "val_loss") for loss, metrics in pairs]
        return pd.DataFrame(rows, pd.Index(result.evaluation_updates, name="update"))
    raise SettingsError([f"`kind` must be 'updates' or 'evaluations', but is {kind!r} instead."])
