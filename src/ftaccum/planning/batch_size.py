"""The size of an update, and how its learning rate follows from that."""

import bisect
import math
from dataclasses import dataclass, replace

from ..errors import SettingsError
from ..settings.recipe import Recipe


@dataclass(frozen=True)
class BatchSizes:
    """The resolved sizes of an update.

    `gradient_accumulation_steps` passes (k) of at most `batch_size` rows on each of `num_processes` processes hold
    `effective_batch_size` rows. The last micro-batch may be short.

    Attributes:
        later: the changes of k in training, as pairs (from_update, k) in ascending order, with updates counted from 0.
            All other sizes are those of the first update.
    """

    batch_size: int
    gradient_accumulation_steps: int
    num_processes: int
    effective_batch_size: int
    later: tuple[tuple[int, int], ...] = ()

    def at(self, update: int) -> "BatchSizes":
        """Return the sizes of one update (from 0), without later changes."""
        changes = bisect.bisect(self.later, update, key=lambda change: change[0])
        if not changes:
            return replace(self, later=())
        k = self.later[changes - 1][1]
        return BatchSizes(self.batch_size, k, self.num_processes, k * self.batch_size * self.num_processes)

    def stages(self) -> list[tuple[int, "BatchSizes"]]:
        """Return pairs of an update and the sizes that apply from it on."""
        return [(update, self.at(update)) for update in (0, *(update for update, _ in self.later))]


def rate_factor(rule: str, ratio: float) -> float:
    """Return the factor on the learning rate for a batch that is `ratio` times as large.

    Args:
        rule: "linear": `ratio`, which keeps the distance that SGD moves per row (Goyal et al. 2017, arXiv:1706.02677).
            "sqrt": the square root of `ratio`, the rule for adaptive optimizers such as Adam (Malladi et al. 2022,
            arXiv:2205.10287). "none": 1.
        ratio: new size / old size.
    """
    return {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[rule]


def batch_sizes_of(
    recipe: Recipe, batch_size: int, num_processes: int, tokens_per_row: float | None = None
) -> BatchSizes:
    """Return the sizes of a run's updates from the different ways to give them.

    k may be given as pairs (from_update, k), without the other two ways. If k is 1 and one of the others is given, that
    one decides. From `tokens_per_update` follow rows = tokens_per_update / tokens_per_row, to the nearest row.

    Args:
        batch_size: rows of a micro-batch on one process.
        tokens_per_row: mean length of the rows in tokens, needed with `tokens_per_update`.

    Raises:
        SettingsError: if two of the settings disagree; the message shows the arithmetic.
    """
    steps, pass_rows = recipe.gradient_accumulation_steps, batch_size * num_processes
    assert not isinstance(steps, str), "the settings have parsed text into pairs"
    if not isinstance(steps, int):
        (_, first), *later = steps
        return BatchSizes(
            batch_size, first, num_processes, first * pass_rows, tuple((update, k) for update, k in later)
        )
    from_steps = steps * pass_rows
    asked = {}  # number of rows → the arithmetic behind it
    if recipe.effective_batch_size is not None:
        asked[recipe.effective_batch_size] = f"`effective_batch_size` asks for {recipe.effective_batch_size} rows"
    if recipe.tokens_per_update is not None:
        assert tokens_per_row is not None, "`tokens_per_update` needs the mean length of a row"
        rows = max(1, round(recipe.tokens_per_update / tokens_per_row))
        asked[rows] = (
            f"`tokens_per_update` asks for {recipe.tokens_per_update} tokens / {tokens_per_row:g} per row = {rows} rows"
        )
    # The other two give a number of rows. k gives a number of passes, and agrees with any rows that need as many.
    passes = {math.ceil(rows / pass_rows) for rows in asked}
    steps_agree = steps == 1 or passes <= {steps}
    if len(asked) > 1 or not steps_agree:
        if not steps_agree:
            asked[from_steps] = (
                f"`gradient_accumulation_steps` asks for {batch_size} rows × {steps} steps"
                f" × {num_processes} processes = {from_steps} rows"
            )
        raise SettingsError([f"Sizes of an update disagree: {'; '.join(asked.values())}. Give one of them."])
    effective = next(iter(asked), from_steps)
    return BatchSizes(batch_size, math.ceil(effective / pass_rows), num_processes, effective)
