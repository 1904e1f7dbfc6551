"""The settings of a verification, with their rules; flags for the command line."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from ...fields import Count, Positive, one_of, select_settings, setting
from ...settings import Recipe, Runtime

Measure = Annotated[str, one_of("float64", "float32", "model")]

_verification = partial(setting, group="verification")


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """How a gradient is verified. The Recipe and the Runtime say which gradient."""

    n_splits: Count = _verification(3, "cuts of the window into random orders and sizes, besides the regular ones")
    dtype: Measure | None = _verification(
        None,
        "number type of the measurement: float64, float32, or model (as it is); none takes float64, or what the "
        "model can and memory allows, and under autocast the model as it is",
    )
    tolerance: Positive | None = _verification(
        None, "relative error up to which a gradient counts as exact; none measures what rounding does here"
    )


@dataclass
class VerifyOutput:
    """The options of `ftaccum verify` that `verify` does not take."""

    json: str | None = _verification(None, "file for the table as JSON; - for standard output, and nothing else there")


# What the gradient of a window depends on, and nothing that happens to it later.
VerifyRecipe = select_settings("VerifyRecipe", Recipe, lambda traits: traits.in_verify)
VerifyRuntime = select_settings("VerifyRuntime", Runtime, lambda traits: traits.in_verify)
