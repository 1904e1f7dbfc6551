"""The options of `ftaccum plan` that estimate memory. This module does not load torch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Any

from ...arguments import find_faults, read_settings
from ...errors import refuse
from ...fields import Text, one_of, select_fields, setting
from ...settings.recipe import Recipe
from ...settings.runtime import Runtime
from ...tasks.arguments import TASKS, Dtype

_data = partial(setting, group="model and data")

TaskName = Annotated[str, one_of(*TASKS)]


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """The model whose memory is estimated. Only its config is loaded, never its weights."""

    model: Text | None = _data(
        None, "folder or hub name of a model, to estimate memory per process from its config; none: no estimate"
    )
    task: TaskName | None = _data(None, f"kind of task, for its head: {', '.join(TASKS)}; none: the config's class")
    dtype: Dtype = _data("auto", "type of the weights: float32, bfloat16, float16, or auto: as in the config")


MemoryRecipe = select_fields("MemoryRecipe", Recipe, ("optimizer", "max_length"))
MemoryRuntime = select_fields(
    "MemoryRuntime", Runtime, ("gradient_checkpointing", "mixed_precision", "accumulate_in_fp32", "sync")
)


def read_memory_options(options: Sequence[Any]) -> list[Any]:
    """Return instances of `PlannedModel`, `MemoryRecipe` and `MemoryRuntime` with their values parsed.

    Raises:
        SettingsError: if a value breaks its rule, or an option is given without `model`.
    """
    parsed = [read_settings(type(each), vars(each)) for each in options]
    faults = [fault for each in parsed for fault in find_faults(each)]
    given = [f.name for each in parsed for f in fields(each) if getattr(each, f.name) != f.default]
    if given and parsed[0].model is None:
        faults += [f"`{name}` is given, but `model` is None. It only matters to memory: add `--model NAME`."
                   for name in given]  # fmt: skip
    refuse(faults)
    return parsed
