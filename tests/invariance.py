"""One Recipe with many Runtimes, which must all give the same weights, losses and norms."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ftaccum import Result, test_fine_tuning
from heads import HEADS, all_in_float64, relative_error

# One causal and two bidirectional models: mistakes in right padding do not show in a causal model.
NAMES = ("causal LM, Llama", "sequence classification, BERT", "token classification, BERT")

# Physical batch → k on one process, for windows of 12 rows; 31 rows leave a remainder.
CUTS = {1: 12, 3: 4, 4: 3, 5: 3, 12: 1}

# Settings that balance classes, by model.
BALANCED: dict[str, dict[str, Any]] = {
    NAMES[1]: {"sampler": "balanced", "class_weights": [0.5, 3.0, 1.25]},
    NAMES[2]: {"class_weights": "balanced", "label_smoothing": 0.1},
}


def trained(
    name: str, batch_size: int | str, prepare: Callable[[nn.Module], object] = lambda _: None, **arguments: Any
) -> tuple[dict[str, Tensor], Result]:
    """Return the weights and the result of a run in float64, by default two epochs in windows of 12 rows.

    Args:
        prepare: called with the model before the run.
    """
    head = HEADS[name]
    model: nn.Module = head.model()
    prepare(model)
    size = {} if "gradient_accumulation_steps" in arguments else {"effective_batch_size": 12}
    arguments = {"n_epochs": 2} | size | arguments
    with all_in_float64():
        result = test_fine_tuning(
            model,
            train_data=head.rows(34),
            validation_split=0.1,
            batch_size=batch_size,
            learning_rate=1e-3,
            gradient_clip_norm=0.5,
            lr_scheduler="cosine",
            warmup_steps=2,
            progress=False,
            **arguments,
        )
    return model.state_dict(), result


def difference(one: tuple[dict[str, Tensor], Result], other: tuple[dict[str, Tensor], Result]) -> float:
    """Return the largest relative difference of the weights and of the numbers in the histories."""
    found = [relative_error(other[0], one[0])]
    for name in ("loss_history", "grad_norm_history", "lr_history", "train_loss_history", "val_loss_history"):
        wanted, got = (torch.tensor(run[1][name], dtype=torch.float64) for run in (one, other))
        found.append(float(((got - wanted).abs() / wanted.abs().clamp(min=1e-9)).max()))
    return max(found)
