"""The trainable parameters of a model, and the groups in which the optimizer gets them."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import SettingsError, refuse
from ..settings.recipe import Recipe
from .model_parts import embedding_parameters, head_parameters, layer_depths

ParamGroups = list[dict[str, Any]]
_MUON = "muon"
_SHOWN = 3  # names of parameters in a message


@dataclass
class ParameterGroup:
    """Parameters with the same learning rate and weight decay.

    Attributes:
        origin: the part of the model, or the pattern, that decides on the rate; empty for `learning_rate` itself.
        lr: the peak learning rate.
        weight_decay: the weight decay.
        is_hidden: whether Muon updates them: matrices that belong to neither embeddings nor head.
        params: the parameters.
    """

    origin: str
    lr: float
    weight_decay: float
    is_hidden: bool = False
    params: list[nn.Parameter] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the group as a torch optimizer takes it."""
        return {"params": self.params, "lr": self.lr, "weight_decay": self.weight_decay}


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient.

    Raises:
        SettingsError: if every parameter is frozen.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise SettingsError(["`model` has no trainable parameter: all have `requires_grad=False`. Unfreeze some."])
    return trainable


def parameter_groups(model: nn.Module, recipe: Recipe, loss_module: nn.Module | None = None) -> list[ParameterGroup]:
    """Return the groups of the trainable parameters; without settings for groups: matrices, and the rest.

    Parameters of fewer than two dimensions are biases, scales of norms and the like, which usually get no weight decay
    (as in BERT and GPT-2). An empty group is left out. Of two settings for the rate of a parameter, the first counts:
    `optimizer_groups`, `head_learning_rate`, `layerwise_lr_decay`.

    With `layerwise_lr_decay`, the rate d layers below the head is learning_rate · decay^d (the discriminative
    fine-tuning of Howard & Ruder 2018, arXiv:1801.06146; also in ELECTRA, Clark et al. 2020, arXiv:2003.10555).

    Args:
        loss_module: a loss whose parameters are trained too. Their names begin with `loss_fn.`

    Raises:
        SettingsError: if every parameter is frozen, or the model lacks a part that a setting needs.
    """
    trainable_parameters(model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    muon = _hidden_matrices(model, named.values()) if recipe.optimizer == _MUON else set()
    if loss_module is not None:
        known = set(named.values())
        of_loss = ((f"loss_fn.{name}", p) for name, p in loss_module.named_parameters())
        named |= {name: p for name, p in of_loss if p.requires_grad and p not in known}
    rates = _rates_by_part(model, recipe)
    patterns = _first_patterns(list(named), _asked_groups(recipe))
    groups: dict[tuple, ParameterGroup] = {}
    for name, p in named.items():
        rank, origin, lr = rates.get(p, (0, "", recipe.learning_rate))
        decay, tier = (recipe.weight_decay, 0) if p.ndim >= 2 else (0.0, 1)
        if name in patterns:
            number, options = patterns[name]
            rank, origin, lr = number, f"`{options['pattern']}`", options.get("lr", lr)
            decay, tier = (options["weight_decay"], 0) if "weight_decay" in options else (decay, tier)
        key = (rank, -lr, tier, p not in muon)
        group = groups.setdefault(key, ParameterGroup(origin, lr, decay, p in muon))
        group.params.append(p)
    return [groups[key] for key in sorted(groups)]


def describe_groups(groups: Sequence[ParameterGroup]) -> list[str]:
    """Return the banner's lines about the groups: parameters and rates of each part. Empty for the usual two groups."""
    by_part: dict[tuple[str, bool], list[ParameterGroup]] = {}
    for group in groups:
        by_part.setdefault((group.origin, group.is_hidden), []).append(group)
    if by_part.keys() == {("", False)}:
        return []
    has_muon = any(group.is_hidden for group in groups)
    lines = []
    for (origin, is_hidden), members in by_part.items():
        n_parameters = sum(p.numel() for group in members for p in group.params)
        rates = sorted({group.lr for group in members})
        decays = dict.fromkeys(f"{group.weight_decay:g}" for group in members)
        part = origin or ("hidden matrices" if is_hidden else "all others")
        kind = (" (Muon)" if is_hidden else " (AdamW)") if has_muon else ""
        lines.append(
            f"  {part}{kind}: {n_parameters:,} parameters, learning rate "
            f"{' to '.join(f'{rate:g}' for rate in dict.fromkeys((rates[0], rates[-1])))}, weight decay "
            f"{' and '.join(decays)}"
        )
    return [f"Parameter groups ({len(groups)}):", *lines]


def _asked_groups(recipe: Recipe) -> Sequence[Mapping[str, Any]]:
    groups: Any = recipe.optimizer_groups
    return groups or ()


def _rates_by_part(model: nn.Module, recipe: Recipe) -> dict[nn.Parameter, tuple[int, str, float]]:
    """Return the position of its group among the groups, the part of the model and the rate, by parameter."""
    faults = []
    rates: dict[nn.Parameter, tuple[int, str, float]] = {}
    if (decay := recipe.layerwise_lr_decay) not in (None, 1):
        depths = layer_depths(model)
        if not depths:
            faults.append(
                f"`layerwise_lr_decay` is {decay}, but {type(model).__name__} has no `nn.ModuleList`, in which the "
                "layers of a model are looked for. Give the rates of its parts as `optimizer_groups` instead."
            )
        rates = {p: (0, part, recipe.learning_rate * decay**depth) for p, (depth, part) in depths.items()}
    if (rate := recipe.head_learning_rate) is not None:
        head = {p for p in head_parameters(model) if p.requires_grad}
        if not head:
            faults.append(
                f"`head_learning_rate` is {rate}, but {type(model).__name__} has no trainable parameters outside its "
                "base model (`base_model_prefix`). Leave it out, or name the head's parameters in `optimizer_groups`."
            )
        rates |= dict.fromkeys(head, (1, "head", rate))
    refuse(faults)
    return rates


def _first_patterns(names: Sequence[str], asked: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, Any]]:
    """Return the first group whose pattern is found in a name, and its number, for each name that has one.

    Raises:
        SettingsError: for each pattern that decides on no parameter.
    """
    found: dict[str, tuple[int, Any]] = {}
    faults = []
    for number, group in enumerate(asked, start=2):
        pattern = group["pattern"]
        matches = [name for name in names if re.search(pattern, name)]
        if not matches:
            faults.append(f"`optimizer_groups` has the pattern {pattern!r}, which is found in no name of a trainable ")
            faults[-1] += f"parameter. {_similar_names(pattern, names)}"
        elif all(name in found for name in matches):
            faults.append(
                f"`optimizer_groups` has the pattern {pattern!r}, but earlier patterns already match all of its "
                f"parameters, such as {matches[0]!r}. Put it before them, or leave it out."
            )
        for name in matches:
            found.setdefault(name, (number, group))
    refuse(faults)
    return found


def _similar_names(pattern: str, names: Sequence[str]) -> str:
    """Return a sentence with names of parameters that resemble a pattern, or else with the first ones."""
    parts = list(dict.fromkeys(part for name in names for part in name.split(".") if not part.isdecimal()))
    words = re.findall(r"[A-Za-z_]\w+", pattern)
    similar = [match for word in words for match in difflib.get_close_matches(word, parts, 1)]
    near = [name for name in names if any(part in name.split(".") for part in similar)]
    listed = ", ".join(map(repr, (near or list(names))[:_SHOWN]))
    return f"{'Similar names are' if near else 'The names are, for example,'} {listed}."


def _hidden_matrices(model: nn.Module, trainable: Any) -> set[nn.Parameter]:
    """Return the trainable matrices that belong to neither embeddings nor head, which Muon updates."""
    others = embedding_parameters(model) | head_parameters(model)
    hidden = {p for p in trainable if p.ndim == 2 and p not in others}
    if not hidden:
        raise SettingsError(
            [
                f"`optimizer` is 'muon', which updates hidden matrices, but {type(model).__name__} has no trainable "
                "parameter of two dimensions outside embeddings and head. Give another optimizer, such as 'adamw'."
            ]
        )
    return hidden
