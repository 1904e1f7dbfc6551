"""The options with which models were loaded, for the records of the runs that train them."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..runtime.adapters import is_peft_model
from ..runtime.model_wrapper import model_to_save
from .arguments import NamedArguments

_OPTIONS = WeakKeyDictionary[nn.Module, dict[str, Any]]()


def remember_options(model: nn.Module, named: NamedArguments) -> None:
    """Remember the options of a model that was loaded for a task, as long as the model exists."""
    _OPTIONS[model] = asdict(named)


def options_of(model: Any) -> Mapping[str, Any]:
    """Return the options that a model, or the one inside of it, was loaded with; none for any other model."""
    model = model_to_save(model)
    base = model.get_base_model() if is_peft_model(model) else model
    return _OPTIONS.get(base, {})
