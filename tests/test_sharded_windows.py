"""What a sharded model refuses if its loss reads all rows of an update."""

from types import SimpleNamespace
from typing import Any

import pytest

from ftaccum.errors import SettingsError
from ftaccum.training.check_window_loss import check_sharded_window


def objective(*, window: bool, read: tuple[str, ...] = (), balanced: tuple[str, ...] = ()) -> Any:
    report = SimpleNamespace(window=SimpleNamespace(read_parameters=read) if read else None, balanced=balanced)
    return SimpleNamespace(report=report, window=object() if window else None)


@pytest.mark.parametrize(
    ("given", "is_compiled", "message"),
    [
        (objective(window=True, read=("logit_scale",)), False, "reads its weight `logit_scale` outside of `forward`"),
        (objective(window=True), True, "Leave `compile` out, or train a whole copy"),
        (objective(window=True, balanced=("aux_loss",)), True, "set `router_balance='micro_batch'`"),
    ],
)
def test_what_shards_cannot_compute_is_refused(given: Any, is_compiled: bool, message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("(", r"\(")):
        check_sharded_window(given, is_compiled=is_compiled)


def test_other_losses_are_not_refused() -> None:
    check_sharded_window(objective(window=False), is_compiled=True)
    check_sharded_window(objective(window=True), is_compiled=False)
