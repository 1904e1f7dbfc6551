"""`plan`: compute the batch sizes and updates of a run without running it."""

from dataclasses import dataclass

from ..arguments import faults_of_schedule, find_faults, read_settings
from ..errors import refuse
from ..fields import Length, PositiveInt, select_settings, setting
from ..planning.batch_size import batch_sizes_of
from ..planning.plan import Plan
from ..planning.shuffle import n_held_out
from ..porting.keywords import explain_keywords
from ..rules.update_size import Pairs
from ..settings.recipe import Recipe
from ..settings.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """The arguments of `plan` that are not in the Recipe, with their rules and command-line options."""

    n_rows: PositiveInt = setting(1000, "number of rows, including those held out", group="length of training")
    batch_size: PositiveInt = setting(
        4, "rows of a micro-batch on one process (the physical batch)", group="size of an update"
    )
    tokens_per_row: Length | None = setting(
        None, "mean length of the rows in tokens; required with tokens_per_update", group="size of an update"
    )
    num_processes: PositiveInt = setting(1, "processes that `accelerate launch` would start", group="size of an update")


PlanRecipe = select_settings("PlanRecipe", Recipe, lambda traits: traits.in_plan)


@explain_keywords(others=[*Recipe.__dataclass_fields__, *Runtime.__dataclass_fields__])
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
    """Compute the batch sizes and updates of a run without running it. `print(plan(...))` shows them.

    Args:
        n_rows: number of rows, including those that `validation_split` holds out.
        tokens_per_row: mean length of the rows, in tokens; required with `tokens_per_update`.
        num_processes: number of processes that `accelerate launch` would start.

    The other arguments are those of `test_fine_tuning`.

    Returns:
        The plan that `test_fine_tuning` would follow.

    Raises:
        SettingsError: if arguments cannot be used, with a sentence for each.
    """
    own = {
        "n_rows": n_rows,
        "batch_size": batch_size,
        "tokens_per_row": tokens_per_row,
        "num_processes": num_processes,
    }
    learned = {
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "effective_batch_size": effective_batch_size,
        "tokens_per_update": tokens_per_update,
        "n_epochs": n_epochs,
        "max_updates": max_updates,
        "remainder": remainder,
        "learning_rate_scaling": learning_rate_scaling,
        "validation_split": validation_split,
        "random_seed": random_seed,
    }
    arguments, recipe = read_settings(PlanArguments, own), read_settings(Recipe, learned)
    faults = find_faults(arguments) + find_faults(recipe) or faults_of_schedule(recipe)
    if recipe.tokens_per_update is not None and arguments.tokens_per_row is None:
        faults.append("`tokens_per_update` needs `tokens_per_row`, which is None. Give the mean row length.")
    refuse(faults)
    n_held = n_held_out(arguments.n_rows, recipe.validation_split)
    return Plan(
        arguments.n_rows - n_held,
        recipe.n_epochs,
        batch_sizes_of(recipe, arguments.batch_size, arguments.num_processes, arguments.tokens_per_row),
        recipe.random_seed,
        n_held,
        recipe.remainder,
        recipe.max_updates,
        recipe.learning_rate_scaling,
    )
