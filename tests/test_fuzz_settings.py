"""Any value of any setting is accepted by its rule, or refused with a message that names the setting."""

import fractions
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given
from torch import nn

from ftaccum import SettingsError, plan, verify
from ftaccum.apps.search.settings import SearchSettings
from ftaccum.apps.verify.settings import VerifySettings
from ftaccum.arguments import find_faults, parse_settings, read_settings
from ftaccum.settings.recipe import Recipe
from ftaccum.settings.runtime import Runtime
from fuzzing import fuzz

SETTINGS = [
    (kind, name) for kind in (Recipe, Runtime, SearchSettings, VerifySettings) for name in kind.__dataclass_fields__
]


class Hostile:
    """An object that raises on every access, comparison and `repr`."""

    __hash__ = None  # type: ignore[assignment]

    def _raise(self, *_: Any) -> Any:
        raise RuntimeError("leave me alone")

    __eq__ = __bool__ = __repr__ = __getattr__ = __len__ = __iter__ = _raise


def _endless() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


_NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2**63 - 1, 2**63, 10**400, -(10**5000)])
_PLAIN = st.one_of(st.none(), st.booleans(), _NUMBERS, st.text(), st.binary(max_size=4))
_ODD = st.sampled_from(
    [
        Hostile(), [Hostile()], _endless(), object(), int, len, "x" * 10**5, "0:" + "9" * 5000, "\0", "\ud800", "auto",
        Path("x"), fractions.Fraction(10**400), 1j, {}, set(), {"a": 1}, range(3), memoryview(b"abc"), Ellipsis,
        np.float32(2), np.int64(3), np.bool_(True), np.array(3), np.array([[0, 2]]), np.array("x"), np.float64("nan"),
        np.datetime64("2000-01-01"), torch.tensor(3), torch.ones(2), torch.ones(2, device="meta"),
        pd.DataFrame({"a": [1, 2]}), [1e308] * 3, [0, 0, 0], [math.nan] * 3, [[0, 10**400]], "0:2,3:4",
        [(0, 2), (3, 4)],
    ]
)  # fmt: skip
ANYTHING = _PLAIN | _ODD | st.lists(_PLAIN, max_size=3) | st.lists(st.lists(_NUMBERS, max_size=3), max_size=3)


@fuzz(examples=200)
@given(setting=st.sampled_from(SETTINGS), value=ANYTHING)
def test_any_value_of_a_setting_is_accepted_or_refused_by_name(setting: tuple[type, str], value: Any) -> None:
    kind, name = setting
    faults = find_faults(read_settings(kind, {name: value}))
    assert len(faults) <= 1
    for fault in faults:
        assert fault.startswith(f"`{name}` must be ")
        assert len(fault) < 2000
    if name in MEANT and (isinstance(value, int | float | str) or value is None):
        assert MEANT[name](value) == (not faults), (name, value, faults)


def _is_whole(value: Any) -> bool:
    return type(value) is int and -(2**63) < value < 2**63


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (type(value) is float and math.isfinite(value))


def _meant() -> dict[str, Callable[[Any], bool]]:
    """Return a test of the values of each setting, written independently of its rule."""
    positive: Callable[[Any], bool] = lambda v: _is_whole(v) and v >= 1
    count: Callable[[Any], bool] = lambda v: _is_whole(v) and v >= 0
    above_0: Callable[[Any], bool] = lambda v: _is_number(v) and v > 0
    share: Callable[[Any], bool] = lambda v: _is_number(v) and 0 <= v < 1
    found = {
        **dict.fromkeys(("n_epochs", "n_trials", "n_reports", "n_workers"), positive),
        **dict.fromkeys(("warmup_steps", "num_workers", "n_splits"), count),
        **dict.fromkeys(("learning_rate",), above_0),
        **dict.fromkeys(("warmup_ratio", "validation_split"), share),
        "weight_decay": lambda v: _is_number(v) and v >= 0,
        "random_seed": lambda v: _is_whole(v) and 0 <= v < 2**32,
        "batch_size": lambda v: v == "auto" or positive(v),
        "lr_scheduler": lambda v: isinstance(v, str) and v != "" and "\0" not in v,
    }
    for name in ("max_updates", "effective_batch_size", "tokens_per_update", "early_stopping_patience", "max_tokens"):
        found[name] = lambda v: v is None or positive(v)
    for name in ("gradient_clip_norm", "tolerance"):
        found[name] = lambda v: v is None or above_0(v)
    for kind, name in SETTINGS:
        if isinstance(kind.__dataclass_fields__[name].default, bool):
            found[name] = lambda v: v is True or v is False
    return found


MEANT = _meant()


@fuzz(examples=150)
@given(given=st.dictionaries(st.sampled_from([name for _, name in SETTINGS]), ANYTHING, max_size=6))
def test_any_settings_together_are_accepted_or_refused_by_name(given: dict[str, Any]) -> None:
    faults = _faults(lambda: parse_settings(given))
    assert all(any(f"`{name}`" in fault for name in given) for fault in faults)


@fuzz(examples=200)
@given(given=st.dictionaries(st.sampled_from(list(inspect.signature(plan).parameters)), ANYTHING, max_size=3))
@example({"n_epochs": 2**62})
@example({"n_rows": 2**62, "n_epochs": 2**62, "effective_batch_size": 2**62})
@example({"n_epochs": 2**62, "max_updates": 5, "remainder": "carry"})
@example({"gradient_accumulation_steps": [(0, 1), (2**62, 2**62)], "learning_rate_scaling": "sqrt"})
@example({"tokens_per_update": 2**62, "tokens_per_row": 5e-324})
@example({"n_rows": np.array(30)})
def test_a_plan_of_any_values_is_described_or_refused_by_name(given: dict[str, Any]) -> None:
    faults = _faults(lambda: str(plan(**{"n_rows": 30} | given)))
    assert all(any(f"`{name}`" in fault for name in inspect.signature(plan).parameters) for fault in faults)


def _faults(call: Callable[[], Any]) -> tuple[str, ...]:
    try:
        call()
    except SettingsError as error:
        return error.faults
    return ()


def test_a_plan_with_too_many_updates_is_refused() -> None:
    with pytest.raises(
        SettingsError, match=r"`n_epochs` is 1000000000, which over 10 rows makes up to 10000000000 updates"
    ):
        plan(10, n_epochs=10**9, batch_size=1, validation_split=0.0)
    assert plan(10, n_epochs=10**9, max_updates=7, validation_split=0.0).n_windows == 7
    assert plan(10**12, n_epochs=1, batch_size=10**9).n_validation_rows == 10**11


def test_verify_accepts_numpy_numbers_as_settings() -> None:
    with pytest.raises(SettingsError, match="`n_splits` must be a non-negative integer, but is -1 instead"):
        verify(nn.Linear(2, 2), [{"x": [1.0]}], n_splits=np.int64(-1))  # type: ignore[arg-type]
