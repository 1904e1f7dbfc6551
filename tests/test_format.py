"""Numbers and durations as short texts."""

import math

import pytest

from ftaccum.insight.format import format_bytes, format_duration, format_number, known


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.34375, "0.3438"), (0.0, "0.0000"), (0.00012345, "0.0001234"), (2.5e7, "2.5e+07"), (-math.inf, "-inf")],
)
def test_numbers_have_four_decimals_or_four_digits(value: float, text: str) -> None:
    assert format_number(value) == text


def test_a_value_that_is_not_a_number_is_not_a_missing_one() -> None:
    assert (format_number(math.nan), format_number(known(math.nan)), format_number(None)) == ("nan", "–", "–")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.01234, "0.0123 s"), (99, "99 s"), (100, "1.7 min"), (5999, "100.0 min"), (7200, "2.0 h")]
)
def test_durations_have_the_unit_that_keeps_them_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (28_400, "28.4 kB"), (999_700_000, "1 GB"), (1.074e9, "1.07 GB"), (2.5e14, "250 TB")],
)
def test_sizes_have_three_digits_and_the_unit_that_keeps_them_short(n_bytes: float, text: str) -> None:
    assert format_bytes(n_bytes) == text
