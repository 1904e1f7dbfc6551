"""Optimizers that contain other optimizers."""

import copy
import tempfile
from functools import partial
from typing import Any

from torch.optim import SGD, Optimizer

from interrupted import fine_tuned
from optimizers import muon_and_adamw

from .case import case
from .rates import distance, regression, train


class Holding(Optimizer):
    """An optimizer that steps with another one and does not save the state of that one."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"ratio": 1.0})
        self.base = SGD(self.param_groups, momentum=0.9)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step(closure)


def resumed_error(optimizer: Any, **arguments: Any) -> float:
    """Return the relative difference of the weights between an interrupted and an uninterrupted run."""
    with tempfile.TemporaryDirectory() as folder:
        whole = fine_tuned(
            optimizer=optimizer, n_epochs=1, output_dir=folder, checkpoint_every=4, keep_checkpoints=9, **arguments
        )
        from_there = {"resume": f"{folder}/checkpoints/update-00000004"}
        again = fine_tuned(optimizer=optimizer, n_epochs=1, **from_there, **arguments)
    pairs = [(again.weights[name], value) for name, value in whole.weights.items()]
    return max(float((one - other).abs().max() / other.abs().max().clamp(min=1e-9)) for one, other in pairs)


@case(21, "Muon and AdamW in one optimizer with a state dict of its own: resumed")
def chain_resumes() -> float:
    return resumed_error(muon_and_adamw)


@case(21, "an optimizer that steps with another one, whose moments torch does not save: resumed")
def inner_moments() -> float:
    return resumed_error(Holding, learning_rate=0.05, lr_scheduler="constant", warmup_steps=0)


@case(21, "a schedule for an optimizer that steps with another one")
def schedule_of_inner() -> float:
    model, rows = regression()
    start, reference = copy.deepcopy(model), copy.deepcopy(model)
    arguments = {"learning_rate": 0.1, "lr_scheduler": "linear", "weight_decay": 0.0}
    train(reference, rows, partial(SGD, momentum=0.9), **arguments)
    train(model, rows, Holding, **arguments)
    return distance(model, reference, start)
