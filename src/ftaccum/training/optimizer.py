"""The optimizer of a run: the user's own, or made from the parameter groups."""

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
    """Return the user's optimizer, or one made from the parameter groups by the user's function or as AdamW.

    Args:
        model: the model to train.
        optimizer: the user's optimizer or function; None for AdamW.
        recipe: the settings with the learning rate and the weight decay.
        given: `learning_rate` and `weight_decay`, if the user gave them.

    Raises:
        SettingsError: if `optimizer` is neither an optimizer nor a function that returns one, holds none of the model's
            trainable parameters, or was made with other numbers than those given.
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
                "`optimizer` holds none of the model's trainable parameters, so updates would not change the model. "
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
                    "and `weight_decay`; the first dict holds the weights of two or more dimensions. If your optimizer "
                    "takes no groups, give `lambda groups: Kind([p for g in groups for p in g['params']])`, with its "
                    "class as `Kind`."
                ]
            ) from error
        if isinstance(made, Optimizer):
            return made
    raise SettingsError(
        [
            "`optimizer` must be a torch Optimizer or a function that takes the parameter groups and returns one, but "
            f"{optimizer!r} is neither. For example, give `optimizer=lambda groups: torch.optim.SGD(groups)`."
        ]
    )


def _adamw(groups: ParamGroups) -> Optimizer:
    # `fused` updates all weights in one kernel, which on a CPU takes a fifth of the time. It rejects complex weights.
    is_real = all(p.is_floating_point() for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, fused=True) if is_real else torch.optim.AdamW(groups)


class CoupledBeta2:
    """Makes optimizers with β2 scaled to the batch size.

    With β2' = β2^(B'/B), the second moment has the same half-life in rows at batch size B' as at B:
    B · ln(1/2) / ln β2 (Marek et al. 2025, arXiv:2507.07101).

    Attributes:
        beta2: the scaled β2 of the last optimizer made.
    """

    def __init__(self, factory: OptimizerFactory | None, ratio: float) -> None:
        """Args:
        factory: makes the optimizer; None for AdamW.
        ratio: B'/B, the run's batch size divided by the batch size that the optimizer's own β2 is meant for.
        """
        self._factory, self._ratio = factory or _adamw, ratio
        self.beta2: float | None = None

    def __call__(self, groups: ParamGroups) -> Optimizer:
        """Return an optimizer of the parameter groups.

        Raises:
            SettingsError: if the optimizer has no β2.
        """
        optimizer = self._factory(groups)
        for group in optimizer.param_groups:
            if "betas" not in group:
                raise SettingsError(
                    [
                        f"`couple_beta2` is True, but {type(optimizer).__name__} has no `betas`. Leave `couple_beta2` "
                        "out, or use an optimizer such as Adam."
                    ]
                )
            beta1, beta2 = group["betas"]
            self.beta2 = beta2**self._ratio
            group["betas"] = (beta1, self.beta2)
        return optimizer


def _held(optimizer: Optimizer) -> set[nn.Parameter]:
    return {p for group in optimizer.param_groups for p in group["params"]}
