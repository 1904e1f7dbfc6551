"""Validation rows, their loss in one batch of plain PyTorch, and their evaluation by `test_fine_tuning`."""

from typing import Any

import torch

from ftaccum import Result, test_fine_tuning
from heads import HEADS, all_in_float64, one_batch

NAMES = ("causal LM, Llama", "token classification, BERT", "question answering, BERT", "regression, BERT")
ROWS = {name: HEADS[name].rows() for name in HEADS}
VAL_ROWS = {name: HEADS[name].rows(13, seed=1) for name in HEADS}


def evaluated(name: str, *, model: Any = None, **arguments: Any) -> Result:
    """Run one epoch with 13 validation rows. `initial_loss` is the validation loss of the initial weights."""
    defaults = {"val_data": VAL_ROWS[name], "n_epochs": 1, "progress": False, "lr_scheduler": "constant"}
    with all_in_float64():
        return test_fine_tuning(model or HEADS[name].model(), train_data=ROWS[name], **(defaults | arguments))


def reference(name: str) -> float:
    """Return the model's own mean loss over all validation rows in one batch."""
    with torch.no_grad(), all_in_float64():
        return HEADS[name].model().eval()(**one_batch(VAL_ROWS[name])).loss.item()
