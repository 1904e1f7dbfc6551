"""The modules whose weights are gathered and freed together: the blocks of a model that each pass runs once."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn

from ...errors import SettingsError


def candidate_units(model: nn.Module, block_classes: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Return the modules that may become units, by name, in the order of the model.

    They are the blocks of the model's outermost lists, or the modules of the given classes, if nothing outside of them
    holds one of their weights. A tied weight must stay with both of its modules.

    Args:
        block_classes: the names of the classes of the blocks; none to find them by structure.

    Raises:
        SettingsError: if the model has no module of one of these classes.
    """
    classes = {type(module).__name__ for module in model.modules()}
    if unknown := sorted({*block_classes} - classes):
        raise SettingsError(
            [
                f"`fsdp_transformer_layer_cls_to_wrap` names {', '.join(unknown)}, but the model has no module of this "
                f"class. Its classes are: {', '.join(sorted(classes))}."
            ]
        )
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        is_block = type(module).__name__ in block_classes if block_classes else _is_in_outermost_list(model, name)
        if (
            name
            and is_block
            and not inside
            and not _is_container(module)
            and next(module.parameters(), None) is not None
        ):
            found[name] = module
    holders = _holders(model)
    return {
        name: module
        for name, module in found.items()
        if all(_is_within(holder, name) for p in module.parameters() for holder in holders[id(p)])
    }


class CallOrder:
    """The order in which the passes of a model run its candidates for units.

    Attributes:
        names: the candidates that each pass has run once at most, in their order; the longest if passes differ.
    """

    def __init__(self, model: nn.Module, candidates: dict[str, nn.Module]) -> None:
        self._model, self._candidates = model, candidates
        self._passes: list[list[str]] = []

    @property
    def names(self) -> list[str]:
        """The candidates that can be units, in the order in which passes run them."""
        repeated = {name for each in self._passes for name in each if each.count(name) > 1}
        passes = [[name for name in each if name not in repeated] for each in self._passes]
        longest = max(passes, key=len, default=[])
        places = {name: place for place, name in enumerate(longest)}
        for each in passes:
            known = [places[name] for name in each if name in places]
            if known != sorted(known):
                return []
        return longest

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Record the passes of the model until exit."""
        handles = [self._model.register_forward_pre_hook(lambda *_: self._passes.append([]))]
        for name, module in self._candidates.items():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._ran(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _ran(self, name: str) -> None:
        if self._passes:  # empty if a part of the model is called directly
            self._passes[-1].append(name)


def observing(order: CallOrder | None) -> AbstractContextManager[None]:
    """Return a context in which the order, if there is one, records passes."""
    return nullcontext() if order is None else order.observed()


def _is_in_outermost_list(model: nn.Module, name: str) -> bool:
    *parents, _ = name.split(".")
    lists = [
        n for n in range(len(parents) + 1) if isinstance(model.get_submodule(".".join(parents[:n])), nn.ModuleList)
    ]
    return lists[:1] == [len(parents)]


def _is_container(module: nn.Module) -> bool:
    """Return whether a module only holds others, so that it has no pass of its own."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of the modules that hold each parameter, by its id."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for p in module.parameters(recurse=False):
            holders.setdefault(id(p), []).append(name)
    return holders


def _is_within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def weights_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model by name, a tied one under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False))
