"""Test parameters that only `scripts/test --all` runs."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

# One head for each way of averaging losses, and one that computes a part in float32.
FAST_HEADS = (
    "causal LM, Llama",
    "masked LM, BERT",
    "sequence classification, BERT",
    "token classification, Llama",
    "seq2seq, T5",
    "image classification, ViT",
    "question answering, BERT",
)


def some_slow(names: Iterable[str], fast: Collection[str]) -> list[Any]:
    """Return the names as parameters of a test, with those that are not in `fast` marked as slow."""
    assert any(name in fast for name in names), "some are fast"
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]
