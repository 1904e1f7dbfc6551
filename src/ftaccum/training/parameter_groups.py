"""The trainable parameters of a model, and the groups in which the optimizer gets them."""

from typing import Any

from torch import nn

from ..errors import SettingsError

ParamGroups = list[dict[str, Any]]


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient.

    Raises:
        SettingsError: if every parameter is frozen.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise SettingsError(["`model` has no trainable parameter: all have `requires_grad=False`. Unfreeze some."])
    return trainable


def parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float) -> ParamGroups:
    """Return the trainable parameters in two groups: matrices, with weight decay, and the rest, without.

    Parameters of fewer than two dimensions are biases, scales of norms and the like, which usually get no weight decay
    (as in BERT and GPT-2). An empty group is left out.

    Raises:
        SettingsError: if every parameter is frozen.
    """
    trainable = trainable_parameters(model)
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "lr": learning_rate, "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "lr": learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
