"""The blocks of a model, which FSDP2 gathers one by one."""

from torch import nn


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules of the outermost `nn.ModuleList`s whose weights no module outside of them holds."""
    outside = _holders(model)
    return [block for block in _listed(model) if all(outside[p] == n for p, n in _holders(block).items())]


def _listed(module: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            found += [block for block in child if next(block.parameters(), None) is not None]
        else:
            found += _listed(child)
    return found


def _holders(module: nn.Module) -> dict[nn.Parameter, int]:
    """Return how many modules hold each parameter."""
    counts: dict[nn.Parameter, int] = {}
    for each in module.modules():
        for p in each.parameters(recurse=False):
            counts[p] = counts.get(p, 0) + 1
    return counts
