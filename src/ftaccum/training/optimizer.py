"""The optimizer: made of the parameter groups, or the user's own, and checked."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import SettingsError
from ..settings import Recipe
from .named_options import record_named_options
from .parameter_groups import ParamGroups, parameter_groups
from .rates import check_groups, check_rates_of_instance, settle_rates

OptimizerFactory = Callable[[ParamGroups], Optimizer]


def make_optimizer(
    model: nn.Module, optimizer: OptimizerFactory | Optimizer | None, recipe: Recipe, given: Collection[str]
) -> Optimizer:
    """Return the user's optimizer, what their function makes of the parameter groups, or AdamW.

    Args:
        given: `learning_rate` and `weight_decay`, if the user gave them.

    Raises:
        SettingsError: where it is neither, holds none of the model's trainable parameters, or was made with other
            numbers than those given.
    """
    settings = {"learning_rate": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if isinstance(optimizer, Optimizer):
        made = optimizer
        check_rates_of_instance(made, settings, given)
    else:
        with record_named_options() as named:
            made = _made(optimizer, parameter_groups(model, **settings))
        settle_rates(made, settings, given, named)
    if not _held(made) & {p for p in model.parameters() if p.requires_grad}:
        raise SettingsError(
            [
                "`optimizer` holds none of the model's trainable parameters, so no update would change it. "
                "Build it from this model's parameters, or give a function of the parameter groups."
            ]
        )
    check_groups(made, given)
    return made


def _made(optimizer: OptimizerFactory | None, groups: ParamGroups) -> Optimizer:
    factory = _adamw if optimizer is None else optimizer
    if callable(factory):
        try:
            made: Any = factory(groups)
        except (TypeError, ValueError) as error:
            raise SettingsError(
                [
                    f"`optimizer` failed on the parameter groups: {error}. It gets a list of dicts with `params`, `lr` "
                    "and `weight_decay`, of which the first holds the weights of two dimensions or more. For an "
                    "optimizer that takes no groups, give `lambda groups: Kind([p for g in groups for p in "
                    "g['params']])`."
                ]
            ) from error
        if isinstance(made, Optimizer):
            return made
    raise SettingsError(
        [
            "`optimizer` must be a torch Optimizer or a function of the parameter groups that returns one, but is "
            f"or returned {optimizer!r} instead. For example `optimizer=lambda groups: torch.optim.SGD(groups)`."
        ]
    )


def _adamw(groups: ParamGroups) -> Optimizer:
    # One kernel for all weights (but complex ones): on a CPU, a fifth of the time of one operation after another.
    is_real = all(p.is_floating_point() for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, fused=True) if is_real else torch.optim.AdamW(groups)


class CoupledBeta2:
    """Makes optimizers whose second moment forgets as fast in rows as it would at another batch size.

    At batch sizes B' and B, β2' = β2^(B'/B) keeps the half-life B · ln(1/2) / ln β2 (Marek et al. 2025,
    arXiv:2507.07101).

    Attributes:
        beta2: of the optimizer made last.
    """

    def __init__(self, factory: OptimizerFactory | None, ratio: float) -> None:
        """Args:
        factory: makes the optimizer; None for AdamW.
        ratio: B'/B, the batch size of the run in that for which the optimizer's own β2 is meant.
        """
        self._factory, self._ratio = factory or _adamw, ratio
        self.beta2: float | None = None

    def __call__(self, groups: ParamGroups) -> Optimizer:
        """Raises:
        SettingsError: where the optimizer has no β2.
        """
        optimizer = self._factory(groups)
        for group in optimizer.param_groups:
            if "betas" not in group:
                raise SettingsError(
                    [
                        f"`couple_beta2` is True, but {type(optimizer).__name__} has no `betas`. Leave it out, or use "
                        "an optimizer of Adam's kind."
                    ]
                )
            beta1, beta2 = group["betas"]
            self.beta2 = beta2**self._ratio
            group["betas"] = (beta1, self.beta2)
        return optimizer


def _held(optimizer: Optimizer) -> set[nn.Parameter]:
    return {p for group in optimizer.param_groups for p in group["params"]}
