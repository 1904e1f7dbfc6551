"""The settings of a verification, with their rules and command-line options."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from ...fields import Count, Positive, one_of, select_settings, setting
from ...settings.recipe import Recipe
from ...settings.runtime import Runtime

Measure = Annotated[str, one_of("float64", "float32", "model")]

_verification = partial(setting, group="verification")


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """The settings of a verification. The Recipe and the Runtime decide which gradient is verified."""

    n_splits: Count = _verification(3, "random ways to split the rows of the update, besides the regular ones")
    dtype: Measure | None = _verification(
        None,
        "type of the weights in the measurement: float64, float32, or model (unchanged); none: float64 if the model "
        "and the memory allow it, else float32; unchanged under autocast",
    )
    tolerance: Positive | None = _verification(
        None, "largest relative error that counts as exact; none: derived from the measured rounding error"
    )


@dataclass
class VerifyOutput:
    """The options of `ftaccum verify` that the function `verify` does not have."""

    json: str | None = _verification(None, "file for the table as JSON; - prints only the JSON to standard output")


# The settings that the gradient of a window depends on, without those of how it is used later.
VerifyRecipe = select_settings("VerifyRecipe", Recipe, lambda traits: traits.in_verify)
VerifyRuntime = select_settings("VerifyRuntime", Runtime, lambda traits: traits.in_verify)
