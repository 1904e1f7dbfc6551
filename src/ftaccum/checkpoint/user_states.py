"""The states of a user's own objects: modules with extra state, and callbacks."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import nn

from ..runtime.log import logger
from .serialization import unreadable


class CallbackState(Protocol):
    """The states of the user's callbacks, by name. A state may contain tensors, and is an error if taking it failed."""

    @property
    def changes_weights(self) -> bool: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], *, continues: bool) -> None: ...


class UserStates:
    """The states of modules that override `get_extra_state`, and of callbacks.

    A state that a checkpoint could not hold is left out, with a warning.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Any] | None, callbacks: CallbackState) -> None:
        self._model, self._loss_fn, self._callbacks = model, loss_fn, callbacks
        self._logged: set[str] = set()

    def modules(self) -> list[tuple[str, nn.Module]]:
        """Return the modules that override `get_extra_state`, by name."""
        roots = {"model": self._model, "loss_fn": self._loss_fn}
        named = [
            (f"{root}.{name}".rstrip("."), module)
            for root, part in roots.items()
            if isinstance(part, nn.Module)
            for name, module in part.named_modules()
        ]
        return [(name, m) for name, m in named if type(m).get_extra_state is not nn.Module.get_extra_state]

    def of_modules(self) -> dict[str, Any]:
        found = {name: module.get_extra_state() for name, module in self.modules()}
        for name, state in [*found.items()]:
            if kind := unreadable(state):
                del found[name]
                self.log_once(
                    f"The extra state of `{name}` is not saved in checkpoints: it contains a {kind}, which cannot be "
                    "loaded without running code. A resumed run starts with fresh extra state."
                )
        return found

    def of_callbacks(self) -> dict[str, Any]:
        """Return the states of callbacks by name, without those that could not be read again."""
        found = self._callbacks.state_dict()
        for name, state in [*found.items()]:
            kind = state if isinstance(state, Exception) else unreadable(state)
            if kind:
                del found[name]
                why = f"taking it raised {kind!r}" if isinstance(kind, Exception) else f"it contains a {kind}"
                self.log_once(
                    f"The state of the callback {name} is not saved in checkpoints: {why}. It may contain tensors, "
                    "numbers, texts, lists and dicts. A resumed run starts with a fresh state."
                )
        return found

    def log_once(self, sentence: str) -> None:
        if sentence not in self._logged:
            self._logged.add(sentence)
            logger.warning(sentence)
