"""The optimizer of a run: the user's own, or made from the parameter groups by a function or by name."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import SettingsError, UntrainedLossWarning, warn_user
from ..runtime.optimizers import parameters_of
from ..settings.recipe import Recipe
from .named_optimizers import make_named
from .named_options import record_named_options
from .parameter_groups import ParamGroups, parameter_groups
from .rates import check_groups, check_rates_of_instance, settle_rates

OptimizerFactory = Callable[[ParamGroups], Optimizer]


def make_optimizer(
    model: nn.Module,
    optimizer: OptimizerFactory | Optimizer | None,
    recipe: Recipe,
    given: Collection[str],
    coupled: "CoupledBeta2 | None" = None,
    loss_module: nn.Module | None = None,
) -> Optimizer:
    """Return the user's optimizer, or one made from the parameter groups by the user's function or by name.

    Args:
        model: the model to train.
        optimizer: the user's optimizer or function; None for the optimizer that the recipe names.
        recipe: the settings of the optimizer and its parameter groups.
        given: `learning_rate` and `weight_decay`, if the user gave them.
        coupled: scales β2, if a search couples it to the batch size.
        loss_module: a loss whose parameters are trained too.

    Raises:
        SettingsError: if `optimizer` is neither an optimizer nor a function that returns one, holds none of the model's
            trainable parameters, or was made with other numbers than those given; or if the model does not suit the
            settings.
    """
    if isinstance(optimizer, Optimizer):
        made = optimizer
        check_rates_of_instance(made, _rates_of(recipe), given)
    elif optimizer is None:
        made = make_named(recipe, parameter_groups(model, recipe, loss_module))
    else:
        with record_named_options() as named:
            made = _made(optimizer, [group.as_dict() for group in parameter_groups(model, recipe, loss_module)])
        settle_rates(made, _rates_of(recipe), {*given, *_set_by_groups(recipe)}, named)
    if not {*parameters_of(made)} & {p for p in model.parameters() if p.requires_grad}:
        raise SettingsError(
            [
                "`optimizer` holds none of the model's trainable parameters, so updates would not change the model. "
                "Build it from this model's parameters, or give a function of the parameter groups."
            ]
        )
    check_groups(made, given)
    if coupled is not None:
        coupled.scale(made)
    return made


def warn_of_untrained_loss(optimizer: Optimizer, loss_fn: Any) -> None:
    """Warn if a loss has trainable parameters that the optimizer does not hold."""
    if not isinstance(loss_fn, nn.Module):
        return
    held = {*parameters_of(optimizer)}
    names = [name for name, p in loss_fn.named_parameters() if p.requires_grad and p not in held]
    if names:
        warn_user(
            f"`loss_fn` has the parameter `{names[0]}`, but `optimizer` does not hold it, so it stays as it is. To "
            "train it, make it a parameter of the model, or give an `optimizer` that holds it; with "
            "`loss_over='window'`, the default optimizer does. If it is meant to stay, set its `requires_grad` to "
            "False.",
            UntrainedLossWarning,
        )


def _rates_of(recipe: Recipe) -> dict[str, float]:
    return {"learning_rate": recipe.learning_rate, "weight_decay": recipe.weight_decay}


def _set_by_groups(recipe: Recipe) -> set[str]:
    """Return the settings that differ between groups, which a user's function must not replace by its own numbers."""
    groups: Any = recipe.optimizer_groups or ()
    rates = recipe.layerwise_lr_decay, recipe.head_learning_rate, *(group.get("lr") for group in groups)
    names = {"learning_rate"} if any(rate is not None for rate in rates) else set()
    return names | ({"weight_decay"} if any("weight_decay" in group for group in groups) else set())


def _made(factory: Any, groups: ParamGroups) -> Optimizer:
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
            "`optimizer` must be a name such as 'adamw', a torch Optimizer, or a function that takes the parameter "
            f"groups and returns one, but {factory!r} is none of these. For example, give "
            "`optimizer=lambda groups: torch.optim.SGD(groups)`."
        ]
    )


class CoupledBeta2:
    """A β2 that is scaled to the batch size.

    With β2' = β2^(B'/B), the second moment has the same half-life in rows at batch size B' as at B:
    B · ln(1/2) / ln β2 (Marek et al. 2025, arXiv:2507.07101).

    Attributes:
        beta2: the scaled β2 of the last optimizer.
    """

    def __init__(self, ratio: float) -> None:
        """Args:
        ratio: B'/B, the run's batch size divided by the batch size that the optimizer's own β2 is meant for.
        """
        self._ratio = ratio
        self.beta2: float | None = None

    def scale(self, optimizer: Optimizer) -> None:
        """Scale the β2 of each group that has one.

        Raises:
            SettingsError: if no group has a β2.
        """
        groups = [group for group in optimizer.param_groups if "betas" in group]
        if not groups:
            raise SettingsError(
                [
                    f"`couple_beta2` is True, but {type(optimizer).__name__} has no `betas`. Leave `couple_beta2` "
                    "out, or use an optimizer such as Adam."
                ]
            )
        for group in groups:
            beta1, beta2 = group["betas"]
            self.beta2 = beta2**self._ratio
            group["betas"] = (beta1, self.beta2)


def refuse_float16(model: nn.Module) -> None:
    """Raise SettingsError if a model trains float16 weights, whose gradients a scaler cannot unscale."""
    if any(p.dtype == torch.float16 and p.requires_grad for p in model.parameters()):
        raise SettingsError(
            [
                "`mixed_precision` is 'fp16', but the trainable weights are float16, whose gradients cannot be "
                "unscaled. Load the model in float32 (`dtype=torch.float32`), or use `accumulate_in_fp32`."
            ]
        )
