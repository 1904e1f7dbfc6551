"""The states of users' callbacks, which checkpoints save."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..errors import CallbackError
from ..runtime.log import logger


def states_of(callbacks: Sequence[TrainerCallback]) -> dict[str, dict[str, Any] | Exception]:
    """Return the state of each callback that has one, by name, or the error that taking it has raised."""
    states = {name: _state_of(callback) for name, callback in _named(callbacks)}
    return {name: state for name, state in states.items() if state}


def restore_states(callbacks: Sequence[TrainerCallback], saved: Mapping[str, Any]) -> None:
    """Restore the states of callbacks, which are recognized by their classes and their order.

    Log a warning about states that no callback takes, and about callbacks that begin without their state.

    Raises:
        CallbackError: if a callback raises an error.
    """
    named = dict(_named(callbacks))
    keeping = {name for name, each in named.items() if hasattr(each, "state_dict") and hasattr(each, "load_state_dict")}
    if lacking := sorted(saved.keys() - named.keys()):
        logger.warning(
            f"The checkpoint has a state of the callback {', '.join(lacking)}, but `callbacks` has no such one now. If "
            "it changes the training or the evaluation, the resumed run differs from an uninterrupted one."
        )
    if fresh := sorted(keeping - saved.keys()):
        logger.warning(
            f"The checkpoint has no state of the callback {', '.join(fresh)}, which begins with a fresh one."
        )
    for name, callback in named.items():
        if name in saved:
            try:
                _restore(callback, saved[name])
            except Exception as error:
                raise CallbackError(
                    f"The callback {name} raised while restoring the state that a checkpoint has of it: {error!r}"
                ) from error


def _named(callbacks: Sequence[TrainerCallback]) -> list[tuple[str, TrainerCallback]]:
    """Return the callbacks with the names of their classes; equal ones are numbered."""
    counts: Counter[str] = Counter()
    named = []
    for callback in callbacks:
        name = type(callback).__qualname__
        counts[name] += 1
        named.append((name if counts[name] == 1 else f"{name} {counts[name]}", callback))
    return named


def _state_of(callback: Any) -> dict[str, Any] | Exception:
    try:
        if hasattr(callback, "state_dict"):
            return {"state_dict": callback.state_dict()}
        if isinstance(callback, ExportableState):
            return {"attributes": callback.state()["attributes"]}
    except Exception as error:
        return error
    return {}


def _restore(callback: Any, saved: Mapping[str, Any]) -> None:
    if hasattr(callback, "load_state_dict") and "state_dict" in saved:
        callback.load_state_dict(saved["state_dict"])
    for name, value in saved.get("attributes", {}).items():
        setattr(callback, name, value)
