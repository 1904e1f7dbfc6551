"""The size of an update, and how its learning rate follows from that."""

import bisect
import math
from dataclasses import dataclass, replace

from ..errors import SettingsError
from ..rules.update_size import Pairs
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


def resolve_batch_sizes(
    *,
    batch_size: int,
    gradient_accumulation_steps: int | Pairs = 1,
    effective_batch_size: int | None = None,
    tokens_per_update: int | None = None,
    tokens_per_row: float | None = None,
    num_processes: int = 1,
) -> BatchSizes:
    """Return the sizes of an update from the different ways to give them.

    Args:
        batch_size: rows of a micro-batch on one process.
        gradient_accumulation_steps: k, or pairs (from_update, k), which exclude the next two arguments. If it is 1 and
            one of the next two is given, that one decides.
        effective_batch_size: rows of an update.
        tokens_per_update: tokens of an update; rows = tokens_per_update / tokens_per_row, to the nearest row.
        tokens_per_row: mean length of the rows in tokens, needed with `tokens_per_update`.
        num_processes: number of processes.

    Raises:
        SettingsError: if two of the arguments disagree; the message shows the arithmetic.
    """
    pass_rows = batch_size * num_processes
    if not isinstance(gradient_accumulation_steps, int):
        (_, first), *later = gradient_accumulation_steps
        return BatchSizes(
            batch_size, first, num_processes, first * pass_rows, tuple((update, k) for update, k in later)
        )
    from_steps = gradient_accumulation_steps * pass_rows
    asked = {}  # number of rows → the arithmetic behind it
    if effective_batch_size is not None:
        asked[effective_batch_size] = f"`effective_batch_size` asks for {effective_batch_size} rows"
    if tokens_per_update is not None:
        assert tokens_per_row is not None, "`tokens_per_update` needs the mean length of a row"
        rows = max(1, round(tokens_per_update / tokens_per_row))
        asked[rows] = (
            f"`tokens_per_update` asks for {tokens_per_update} tokens / {tokens_per_row:g} per row = {rows} rows"
        )
    # The other two give a number of rows. k gives a number of passes, and agrees with any rows that need as many.
    passes = {math.ceil(rows / pass_rows) for rows in asked}
    steps_agree = gradient_accumulation_steps == 1 or passes <= {gradient_accumulation_steps}
    if len(asked) > 1 or not steps_agree:
        if not steps_agree:
            asked[from_steps] = (
                f"`gradient_accumulation_steps` asks for {batch_size} rows × {gradient_accumulation_steps} steps"
                f" × {num_processes} processes = {from_steps} rows"
            )
        raise SettingsError([f"Sizes of an update disagree: {'; '.join(asked.values())}. Give one of them."])
    effective = next(iter(asked), from_steps)
    return BatchSizes(batch_size, math.ceil(effective / pass_rows), num_processes, effective)


def batch_sizes_of(
    recipe: Recipe, batch_size: int, num_processes: int, tokens_per_row: float | None = None
) -> BatchSizes:
    """Resolve the sizes of a run's updates; for arguments and errors see `resolve_batch_sizes`."""
    assert not isinstance(recipe.gradient_accumulation_steps, str), "the settings have parsed text into pairs"
    return resolve_batch_sizes(
        batch_size=batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        effective_batch_size=recipe.effective_batch_size,
        tokens_per_update=recipe.tokens_per_update,
        tokens_per_row=tokens_per_row,
        num_processes=num_processes,
    )
