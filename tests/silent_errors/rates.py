"""Optimizers whose learning rate or weight decay differs from the settings."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from transformers import Adafactor

from ftaccum import Result, test_fine_tuning

from .case import case

N_ROWS, N_UPDATES = 8, 3
Factory = Callable[[Any], Optimizer]


def regression() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    rows = [(torch.randn(5, dtype=torch.float64), torch.randn(2, dtype=torch.float64)) for _ in range(N_ROWS)]
    return nn.Linear(5, 2).double(), rows


def train(model: nn.Module, rows: Any, optimizer: Any, **arguments: Any) -> Result:
    """Train for three updates of all rows, in micro-batches of three."""
    return test_fine_tuning(
        model,
        train_data=rows,
        **{
            "loss_fn": nn.MSELoss(),
            "batch_size": 3,
            "effective_batch_size": len(rows),
            "n_epochs": N_UPDATES,
            "validation_split": 0.0,
            "optimizer": optimizer,
            "lr_scheduler": "constant",
            "gradient_clip_norm": None,
            "on_inexact": "error",
            "progress": False,
        }
        | arguments,
    )


def train_plainly(model: nn.Module, rows: Any, optimizer: Optimizer, *, with_closure: bool = False) -> None:
    """Make the same updates in plain PyTorch."""
    inputs, targets = (torch.stack(column) for column in zip(*rows, strict=True))
    for _ in range(N_UPDATES):

        def closure() -> Any:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            return loss

        closure()
        optimizer.step(closure if with_closure else None)  # type: ignore[arg-type]


def distance(model: nn.Module, reference: nn.Module, start: nn.Module) -> float:
    """Return the distance of the trained model from the reference, relative to how far the reference moved."""

    def norm(one: nn.Module, other: nn.Module) -> float:
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        return sum(float((p - q).detach().abs().square().sum()) for p, q in pairs) ** 0.5

    return norm(model, reference) / norm(reference, start)


def error_of(factory: Factory, **arguments: Any) -> float:
    """Return the error of a run with an optimizer against plain PyTorch with the same optimizer."""
    model, rows = regression()
    start, reference = copy.deepcopy(model), copy.deepcopy(model)
    biased = [{"params": [reference.weight]}, {"params": [reference.bias], "weight_decay": 0.0}]
    train_plainly(reference, rows, factory(biased))
    train(model, rows, factory, **arguments)
    return distance(model, reference, start)


@case(15, "a rate in the function: `lambda groups: SGD(groups, lr=0.1)`")
def rate_of_the_function() -> float:
    return error_of(lambda groups: SGD(groups, lr=0.1), weight_decay=0.0)


@case(15, "a rate in the function that is the class's default: `AdamW(groups, lr=1e-3)`")
def default_rate_named() -> float:
    return error_of(lambda groups: AdamW(groups, lr=1e-3))


@case(15, "a weight decay in the function: `SGD(groups, lr=0.1, weight_decay=0.5)`")
def decay_of_the_function() -> float:
    return error_of(lambda groups: SGD(groups, lr=0.1, weight_decay=0.5))


@case(15, "no weight decay in the function: `AdamW(groups, lr=0.1, weight_decay=0)`")
def no_decay_of_adamw() -> float:
    return error_of(lambda groups: AdamW(groups, lr=0.1, weight_decay=0))


@case(15, "no weight decay in the function: `SGD(groups, lr=0.1, weight_decay=0)`")
def no_decay_of_sgd() -> float:
    return error_of(lambda groups: SGD(groups, lr=0.1, weight_decay=0))


@case(15, "no weight decay in the function, and a `weight_decay`", refused="SGD was made with `weight_decay=0`")
def no_decay_and_decay() -> float:
    return error_of(lambda groups: SGD(groups, lr=0.1, weight_decay=0), weight_decay=0.1)


@case(15, "a rate in the function, and another one as `learning_rate`", refused="`learning_rate` is 1, but SGD was")
def two_rates() -> float:
    return error_of(lambda groups: SGD(groups, lr=0.1), learning_rate=1.0, weight_decay=0.0)


@case(15, "a function that drops the groups' rates, and a `learning_rate`", refused="SGD was made with `lr=0.001`")
def dropped_rates() -> float:
    model, rows = regression()
    start, reference = copy.deepcopy(model), copy.deepcopy(model)
    train_plainly(reference, rows, SGD(reference.parameters(), lr=1.0))
    train(model, rows, lambda groups: SGD([p for group in groups for p in group["params"]]), learning_rate=1.0)
    return distance(model, reference, start)


@case(15, "an instance at 0.1, and `learning_rate=1`", refused="the SGD has 0.1")
def instance_and_rate() -> float:
    model, rows = regression()
    start, reference = copy.deepcopy(model), copy.deepcopy(model)
    train_plainly(reference, rows, SGD(reference.parameters(), lr=1.0))
    train(model, rows, SGD(model.parameters(), lr=0.1), learning_rate=1.0)
    return distance(model, reference, start)


def shown_error(factory: Factory, used: Callable[[int], float], **arguments: Any) -> float:
    """Return the largest relative error of the learning rates that a run shows, given the rates by update (from 1)."""
    model, rows = regression()
    shown = train(model, rows, factory, **arguments).lr_history
    wanted = [used(update) for update in range(1, N_UPDATES + 1)]
    return max(abs(rate - w) / w for rate, w in zip(shown, wanted, strict=True))


@case(15, "the rate shown of Adafactor with `relative_step` and `warmup_init`")
def relative_step() -> float:
    return shown_error(lambda groups: Adafactor(groups, warmup_init=True), lambda update: 1e-6 * update)


@case(15, "the rate shown of Adafactor with `relative_step`, `lr=None`, as an instance")
def relative_step_instance() -> float:
    model, rows = regression()
    shown = train(model, rows, Adafactor(model.parameters())).lr_history
    return max(abs(rate - 1e-2) / 1e-2 for rate in shown)


@case(15, "`relative_step` and a `learning_rate`", refused="sets its own")
def relative_step_and_rate() -> float:
    return shown_error(lambda groups: Adafactor(groups), lambda _: 1e-2, learning_rate=1e-3)


@case(15, "the rate shown of torch's Adafactor, which bounds it by 1/√t")
def bounded_rate() -> float:
    return shown_error(
        lambda groups: torch.optim.Adafactor(groups), lambda update: min(0.9, update**-0.5), learning_rate=0.9
    )
