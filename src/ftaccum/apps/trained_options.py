"""The options of `ftaccum eval` and `ftaccum predict`. This module does not load torch."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from ..arguments import find_faults, parse_settings, read_settings
from ..errors import refuse
from ..fields import Text, select_fields, setting
from ..settings.recipe import Recipe
from ..settings.runtime import Runtime
from ..tasks.arguments import TrainedArguments

_output = partial(setting, group="output")

EvaluationRecipe = select_fields("EvaluationRecipe", Recipe, ("text_columns", "max_length"), ("add_eos_token",))
EvaluationRuntime = select_fields(
    "EvaluationRuntime",
    Runtime,
    ("batch_size", "max_tokens", "num_workers", "use_amp", "mixed_precision", "deterministic", "progress", "verbosity"),
)


@dataclass
class EvaluationOutput:
    """The output option of `ftaccum eval`."""

    json: Text | None = _output(None, "file to write the loss and the metrics to, as JSON; none: only print them")


@dataclass
class PredictionOutput:
    """The output option of `ftaccum predict`."""

    output: Text = _output("", "file to write: .jsonl, .csv or .parquet, with the columns of the data (required)")


def checked(named: Any, output: Any, recipe: Any, runtime: Any) -> tuple[TrainedArguments, dict[str, Any]]:
    """Return the options of the data with their values parsed, and the settings by name.

    Raises:
        SettingsError: with all faults.
    """
    settings = vars(recipe) | vars(runtime) | {"validation_split": 0.0}
    needed = [name for name in ("data", "output") if getattr(named, name, getattr(output, name, None)) == ""]
    refuse([f"`--{name}` is required." for name in needed])
    named = read_settings(TrainedArguments, vars(named))
    refuse(
        [
            f"`{name}` must be a positive integer to evaluate or predict, but is 'auto' instead."
            for name in ("batch_size", "max_tokens")
            if getattr(runtime, name) == "auto"
        ]
    )
    given = {name: value for name, value in settings.items() if value is not None}
    parsed_recipe, parsed_runtime = parse_settings(given)
    refuse(find_faults(named) + find_faults(output))
    parsed = vars(parsed_recipe) | vars(parsed_runtime)
    return named, {name: parsed[name] if name in given else None for name in settings}
