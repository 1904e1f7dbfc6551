"""`plan`: the arithmetic of a run, without running it."""

import inspect
from dataclasses import dataclass
from typing import Any

from ..errors import SettingsError
from ..fields import (
    Fraction,
    Length,
    Pairs,
    PositiveInt,
    Remainder,
    Scaling,
    Seed,
    Steps,
    find_faults,
    read_settings,
    setting,
)
from ..planning.batch_size import resolve_batch_sizes
from ..planning.plan import Plan
from ..planning.shuffle import n_held_out
from ..settings import Recipe, Runtime, faults_of_schedule


def _as_in(settings: type[Recipe] | type[Runtime], name: str) -> Any:
    same = settings.__dataclass_fields__[name]
    return setting(same.default, same.metadata["help"])


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """The arguments of `plan`, as settings: with rules, and flags for the command line."""

    n_rows: PositiveInt = setting(1000, "rows of the data, before the hold-out")
    batch_size: PositiveInt = setting(4, "rows of a micro-batch on one process (the physical batch)")
    gradient_accumulation_steps: Steps = _as_in(Recipe, "gradient_accumulation_steps")
    effective_batch_size: PositiveInt | None = _as_in(Recipe, "effective_batch_size")
    tokens_per_update: PositiveInt | None = _as_in(Recipe, "tokens_per_update")
    tokens_per_row: Length | None = setting(None, "mean length of the rows, needed with tokens_per_update")
    num_processes: PositiveInt = setting(1, "processes that `accelerate launch` would start")
    n_epochs: PositiveInt = _as_in(Recipe, "n_epochs")
    max_updates: PositiveInt | None = _as_in(Recipe, "max_updates")
    remainder: Remainder = _as_in(Recipe, "remainder")
    learning_rate_scaling: Scaling = _as_in(Recipe, "learning_rate_scaling")
    validation_split: Fraction = _as_in(Recipe, "validation_split")
    random_seed: Seed = _as_in(Recipe, "random_seed")


def plan(
    n_rows: int,
    *,
    batch_size: int = 4,
    gradient_accumulation_steps: int | str | Pairs = 1,
    effective_batch_size: int | None = None,
    tokens_per_update: int | None = None,
    tokens_per_row: float | None = None,
    num_processes: int = 1,
    n_epochs: int = 3,
    max_updates: int | None = None,
    remainder: str = "flush",
    learning_rate_scaling: str = "none",
    validation_split: float = 0.1,
    random_seed: int = 42,
) -> Plan:
    """The arithmetic of a run, without running it. `print(plan(...))` shows it.

    Args:
        n_rows: rows before the hold-out.
        tokens_per_row: mean length of the rows, in tokens; needed with `tokens_per_update`.
        num_processes: as `accelerate launch` would start.

    The other arguments are those of `test_fine_tuning`.

    Returns:
        The plan that `test_fine_tuning` would follow.

    Raises:
        SettingsError: one sentence for each argument that cannot be used.
    """
    arguments = read_settings(PlanArguments, locals())
    faults = find_faults(arguments) or faults_of_schedule(arguments)
    if arguments.tokens_per_update is not None and arguments.tokens_per_row is None:
        faults.append("`tokens_per_update` needs `tokens_per_row`, which is None. Give the mean length of the rows.")
    if faults:
        raise SettingsError(faults)
    n_held = n_held_out(arguments.n_rows, arguments.validation_split)
    sizes = {name: getattr(arguments, name) for name in inspect.signature(resolve_batch_sizes).parameters}
    return Plan(
        arguments.n_rows - n_held,
        arguments.n_epochs,
        resolve_batch_sizes(**sizes),
        arguments.random_seed,
        n_held,
        arguments.remainder,
        arguments.max_updates,
        arguments.learning_rate_scaling,
    )
