"""The settings of a verification, with their rules; flags for the command line."""

from collections.abc import Collection
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Annotated, Any, get_type_hints

from ...fields import Count, Positive, Rule, setting
from ...settings import Recipe, Runtime

DTYPES = ("float64", "float32", "model")

Measure = Annotated[str, Rule(lambda v: v in DTYPES, "'float64', 'float32' or 'model'")]


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """How a gradient is verified; what is verified are a Recipe and a Runtime."""

    n_splits: Count = setting(3, "cuts of the window into random orders and sizes, beside the regular ones")
    dtype: Measure | None = setting(
        None,
        "what the model is measured in: float64, float32, or model (as it is); none takes float64, or what the model "
        "can and memory allows, and under autocast the model as it is",
    )
    tolerance: Positive | None = setting(
        None, "relative error up to which a gradient counts as exact; none measures what rounding does here"
    )


@dataclass
class VerifyOutput:
    """Where a verification goes, as a command line says it."""

    json: str | None = field(
        default=None, metadata={"help": "file for the table as JSON; - for standard output, and nothing else there"}
    )


def _some(name: str, settings: type, names: Collection[str]) -> Any:
    """Some of the fields of a settings dataclass, as one of their own."""
    hints = get_type_hints(settings, include_extras=True)
    chosen = [f for f in fields(settings) if f.name in names]
    parts = [(f.name, hints[f.name], setting(f.default, f.metadata["help"])) for f in chosen]
    return make_dataclass(name, parts, frozen=True, kw_only=True)


# Those that a window's gradient hangs on, and none of what becomes of it.
VerifyRecipe = _some(
    "VerifyRecipe",
    Recipe,
    ("gradient_accumulation_steps", "effective_batch_size", "tokens_per_update", "random_seed"),
)
VerifyRuntime = _some(
    "VerifyRuntime",
    Runtime,
    (
        "batch_size",
        "max_tokens",
        "planner",
        "planner_costs",
        "padding_free",
        "use_amp",
        "mixed_precision",
        "gradient_checkpointing",
        "deterministic",
        "progress",
    ),
)
