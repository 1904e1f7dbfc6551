"""Optimizers that evaluate the loss again in `step`."""

import copy
from typing import Any

from torch.optim import LBFGS, Optimizer

from optimizers import SAM

from .case import case
from .rates import distance, regression, train, train_plainly


def closure_error(factory: Any, **arguments: Any) -> float:
    """Return the error of a run against plain PyTorch. The optimizer gets all parameters in one group."""

    def of_groups(groups: Any) -> Optimizer:
        return factory([p for group in groups for p in group["params"]])

    model, rows = regression()
    start, reference = copy.deepcopy(model), copy.deepcopy(model)
    train_plainly(reference, rows, factory(reference.parameters()), with_closure=True)
    train(model, rows, of_groups, **arguments)
    return distance(model, reference, start)


@case(22, "LBFGS")
def lbfgs() -> float:
    return closure_error(lambda params: LBFGS(params, lr=0.5, max_iter=4))


@case(22, "LBFGS with a line search")
def lbfgs_with_a_line_search() -> float:
    return closure_error(lambda params: LBFGS(params, line_search_fn="strong_wolfe"))


@case(22, "sharpness-aware minimization, `step(closure)`")
def sam() -> float:
    return closure_error(lambda params: SAM([{"params": params, "lr": 0.2}], rho=0.5))
