"""The contract: every window's gradient is that of one batch of its rows."""

import json
from collections.abc import Callable

import pytest

from exactness import window_errors
from heads import HEADS, all_in_float64


@pytest.mark.parametrize("name", HEADS)
def test_gradient_of_every_window_is_that_of_one_batch(name: str) -> None:
    head = HEADS[name]
    with all_in_float64():
        # 9 rows: two windows of 4, and a remainder of 1
        errors = window_errors(head.model(), head.rows(), batch_size=2, gradient_accumulation_steps=2)
        # a window of 7, whose last micro-batch is short, and a remainder of 2
        errors += window_errors(head.model(), head.rows(), batch_size=2, effective_batch_size=7)
    assert len(errors) == 5
    assert max(errors) < 1e-10


@pytest.mark.parametrize("name", [name for name, head in HEADS.items() if head.tolerance > 1e-10])
def test_heads_that_compute_a_part_in_float32_are_exact_to_its_rounding(name: str) -> None:
    head = HEADS[name]
    assert max(window_errors(head.model(), head.rows(), batch_size=2, effective_batch_size=7)) < head.tolerance


@pytest.mark.processes
def test_gradient_on_two_processes_is_that_of_one_batch(two_processes: Callable[..., str]) -> None:
    printed = two_processes("all_heads.py")
    errors = json.loads(next(line for line in printed.splitlines() if line.startswith("ERRORS "))[7:])
    assert errors.keys() == HEADS.keys()
    assert max(errors.values()) < 1e-10, errors
