"""What a run is given, checked and frozen."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..settings import Recipe, Runtime, parse_settings
from .components import Components, check_components


@dataclass(frozen=True)
class RunConfig:
    """The arguments of `test_fine_tuning`, sorted into settings and components.

    Attributes:
        recipe: what is learned.
        runtime: how it is run.
        components: the model, the data and the functions that the user brings.
    """

    recipe: Recipe
    runtime: Runtime
    components: Components

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> "RunConfig":
        """Sort and check the arguments.

        Args:
            arguments: by name; a setting that is left out takes its default.

        Raises:
            SettingsError: with a sentence for each fault, before anything is loaded.
        """
        recipe, runtime = parse_settings(arguments)
        components = Components(**{f.name: arguments[f.name] for f in fields(Components)})
        check_components(components, recipe, runtime)
        return cls(recipe, runtime, components)
