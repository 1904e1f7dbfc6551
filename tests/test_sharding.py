"""Sharded weights: every window's gradient is that of one batch, and no process waits for another one forever."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from heads import HEADS
from sharding import needs_sharding
from structures import STRUCTURES

pytestmark = [pytest.mark.processes, needs_sharding]

FAST = ["seq2seq, T5", "conditional branches"]
BLOCKS = ["skipped blocks", "skipped blocks with hooks", "an unused block", "blocks that run twice"]


def printed(said: str, word: str) -> Any:
    """Return the JSON that a script has printed after a word."""
    return json.loads(next(line for line in said.splitlines() if line.startswith(f"{word} "))[len(word) + 1 :])


@pytest.mark.parametrize("names", [FAST, pytest.param(["all"], marks=pytest.mark.slow)], ids=["fast", "all"])
def test_gradients_of_sharded_weights_are_those_of_one_batch(
    two_processes: Callable[..., str], names: Sequence[str]
) -> None:
    said = two_processes("sharded_gradients.py", *names)
    errors, units = printed(said, "ERRORS"), printed(said, "UNITS")
    assert len(errors) == 2 * (len(names) if len(names) > 1 else len(HEADS) + len(STRUCTURES) + len(BLOCKS))
    assert max(errors.values()) < 1e-14, errors
    assert units["seq2seq, T5"] == 5  # two blocks of the encoder, two of the decoder, and the rest
    assert units.get("skipped blocks", 5) == 5
    assert units["conditional branches"] == 1


@pytest.mark.slow
def test_a_callback_generates_samples_on_the_main_process(two_processes: Callable[..., str]) -> None:
    whole, sharded = printed(two_processes("sharded_samples_of_two.py"), "SAMPLES")
    assert whole == sharded
    assert len(whole) > 1


@pytest.mark.slow
def test_gradients_are_exact_on_three_processes(processes: Callable[..., str]) -> None:
    said = processes(3, "sharded_gradients.py", *FAST, "causal LM, Llama", "adapters", *BLOCKS)
    errors = printed(said, "ERRORS")
    # Transformers computes some of these in float32, where a factor of 3, unlike one of 2, is rounded.
    in_float32 = ("seq2seq, T5", "causal LM, Llama", "adapters")
    assert max(error for name, error in errors.items() if name.rsplit(", ", 1)[0] not in in_float32) < 1e-14, errors
    assert max(errors.values()) < 1e-6, errors
    assert printed(said, "UNITS")["an unused block"] == 4
    assert printed(said, "UNITS")["blocks that run twice"] == 1
