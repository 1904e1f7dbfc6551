"""The parts of a model whose learning rates may differ: its head, its layers and its embeddings."""

import itertools
from collections.abc import Iterator

from torch import nn

from ..runtime.model_traits import output_embeddings
from ..runtime.model_wrapper import model_to_save


def head_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of the head: those outside the base model that `base_model_prefix` names.

    The set is empty if the model declares no base model, is one itself, or has a head that is tied to it. A
    `ModelWrapper` has the base model of the model inside.
    """
    inner = model_to_save(model)
    base = getattr(inner, getattr(inner, "base_model_prefix", "") or "-", None)
    if not isinstance(base, nn.Module) or base is inner:
        return set()
    return set(model.parameters()) - set(base.parameters())


def embedding_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of all embeddings, and those of the layer that computes the logits of a language model."""
    modules: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if (output := output_embeddings(model_to_save(model))) is not None:
        modules.append(output)
    return {p for module in modules for p in module.parameters()}


def layer_depths(model: nn.Module) -> dict[nn.Parameter, tuple[int, str]]:
    """Return how many layers below the top each parameter is, and a word for that part of the model.

    The layers are the longest `nn.ModuleList` that is in no other one. If several are equally long, such as an encoder
    and a decoder, each has its own top.

    Returns:
        For n layers: 1 for the top layer to n for the lowest one, n + 1 for embeddings and other parameters below the
        layers, and 0 for the rest, such as the head. Empty if the model has no list of layers.
    """
    inner = model_to_save(model)  # the layers of a teacher count for nothing
    stacks = _stacks(inner)
    if not stacks:
        return {}
    n_layers = len(next(iter(stacks.values())))
    depths: dict[nn.Parameter, tuple[int, str]] = {}
    for stack in stacks.values():
        for index, layer in enumerate(stack):
            for p in layer.parameters():
                depths.setdefault(p, (n_layers - index, "layers"))
    below = (embedding_parameters(model) | _registered_before(inner, stacks)) - head_parameters(model)
    outside = {p: (n_layers + 1, "embeddings") if p in below else (0, "above the layers") for p in model.parameters()}
    return outside | depths


def _stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the longest lists of modules with parameters, by name."""
    found = dict(_outermost_lists("", model))
    longest = max(map(len, found.values()), default=0)
    return {name: stack for name, stack in found.items() if len(stack) == longest}


def _outermost_lists(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            if next(child.parameters(), None) is not None:
                yield f"{prefix}{name}.", child
        else:
            yield from _outermost_lists(f"{prefix}{name}.", child)


def _registered_before(model: nn.Module, stacks: dict[str, nn.ModuleList]) -> set[nn.Parameter]:
    """Return the parameters that are registered before the layers that they belong to.

    A parameter between two stacks belongs to the second one if there is a module that holds both, but not the first.
    """
    names = [name for name, _ in model.named_parameters()]
    starts = {stack: next(n for n, name in enumerate(names) if name.startswith(stack)) for stack in stacks}

    def is_before(index: int, stack: str) -> bool:
        holder = _common_module(names[index], stack)
        return index < starts[stack] and not any(
            start < index and other.startswith(holder) for other, start in starts.items()
        )

    return {p for index, p in enumerate(model.parameters()) if any(is_before(index, stack) for stack in stacks)}


def _common_module(one: str, other: str) -> str:
    """Return the name of the smallest module that holds both names, with a dot at its end; empty for the model."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one.split("."), other.split("."), strict=False))
    return "".join(f"{name}." for name, _ in pairs)
