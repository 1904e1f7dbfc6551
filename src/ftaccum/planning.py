"""The plan: rows → epochs → windows. Pure integers.

An epoch is a seeded permutation of the training rows. A window is the next `effective_batch_size` of them, and
makes one update; the last window of an epoch may be short. Only then is the window cut into micro-batches and
dealt to the processes (`cutting`), so that which rows make up an update does not depend on how it is computed.
"""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cutting import Rows
from .errors import SettingsError
from .settings import Fraction, Positive, PositiveInt, Recipe, Runtime, Seed, setting, single_faults

# One number for each use of the seed, so that no two uses draw the same permutation.
_HOLD_OUT, _EPOCH = 0, 1


@dataclass(frozen=True)
class Batching:
    """The sizes of an update, resolved. `gradient_accumulation_steps` passes of at most `batch_size` rows on each
    of `num_processes` processes hold `effective_batch_size` rows; the last micro-batch may be short.
    """

    batch_size: int
    gradient_accumulation_steps: int
    num_processes: int
    effective_batch_size: int


def resolve_batching(
    *,
    batch_size: int,
    gradient_accumulation_steps: int = 1,
    effective_batch_size: int | None = None,
    tokens_per_update: int | None = None,
    tokens_per_row: float | None = None,
    num_processes: int = 1,
) -> Batching:
    """Resolves the three ways to say how large an update is to one.

    Args:
        batch_size: rows of a micro-batch on one process.
        gradient_accumulation_steps: k; 1 leaves the size to the next two, where one of them is given.
        effective_batch_size: rows of an update.
        tokens_per_update: tokens of an update; rows = tokens_per_update / tokens_per_row, to the nearest row.
        tokens_per_row: mean length of the rows, needed with `tokens_per_update`.

    Raises:
        SettingsError: where two of them disagree, with the arithmetic.
    """
    pass_rows = batch_size * num_processes
    from_steps = gradient_accumulation_steps * pass_rows
    asked = {}  # rows asked for → the arithmetic that leads to them
    if effective_batch_size is not None:
        asked[effective_batch_size] = f"`effective_batch_size` asks for {effective_batch_size} rows"
    if tokens_per_update is not None:
        assert tokens_per_row is not None, "tokens_per_update needs the mean length of a row"
        rows = max(1, round(tokens_per_update / tokens_per_row))
        asked[rows] = (
            f"`tokens_per_update` asks for {tokens_per_update} tokens / {tokens_per_row:g} per row = {rows} rows"
        )
    # Rows and tokens name a number of rows; k names a number of passes, and agrees with any rows that need as many.
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
    return Batching(batch_size, math.ceil(effective / pass_rows), num_processes, effective)


def batching_of(recipe: Recipe, runtime: Runtime, num_processes: int, tokens_per_row: float | None = None) -> Batching:
    """`resolve_batching` on the settings of a run, whose physical batch is known."""
    assert isinstance(runtime.batch_size, int), "'auto' is measured first"
    return resolve_batching(
        batch_size=runtime.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        effective_batch_size=recipe.effective_batch_size,
        tokens_per_update=recipe.tokens_per_update,
        tokens_per_row=tokens_per_row,
        num_processes=num_processes,
    )


@dataclass(frozen=True)
class Window:
    """The rows of one update.

    `index` counts windows over the whole run, from 0; `rows` are positions in the training rows.
    """

    index: int
    epoch: int
    rows: Rows


@dataclass(frozen=True)
class Plan:
    """Every window of a run, before anything is loaded.

    Attributes:
        n_rows: training rows, after the hold-out.
        n_epochs: passes over them.
        batching: the resolved sizes of an update.
        seed: of the order of the rows.
        n_validation_rows: rows that are evaluated on.
    """

    n_rows: int
    n_epochs: int
    batching: Batching
    seed: int = 42
    n_validation_rows: int = 0

    @property
    def windows_per_epoch(self) -> int:
        return math.ceil(self.n_rows / self.batching.effective_batch_size)

    @property
    def n_windows(self) -> int:
        return self.n_epochs * self.windows_per_epoch

    @property
    def remainder_rows(self) -> int:
        """Rows of each epoch's last window where it is short, else 0."""
        return self.n_rows % self.batching.effective_batch_size

    def rows_after(self, n_windows: int) -> int:
        """Rows that the first `n_windows` windows of the run hold, counted anew in every epoch."""
        epochs, windows = divmod(n_windows, self.windows_per_epoch)
        return epochs * self.n_rows + windows * self.batching.effective_batch_size

    def windows(self, epoch: int) -> Iterator[Window]:
        """The windows of one epoch (from 0)."""
        order = _permutation(self.n_rows, self.seed, _EPOCH, epoch)
        size = self.batching.effective_batch_size
        for number, start in enumerate(range(0, self.n_rows, size)):
            rows = tuple(order[start : start + size].tolist())
            yield Window(epoch * self.windows_per_epoch + number, epoch, rows)

    def warmup_updates(self, warmup_steps: int, warmup_ratio: float) -> int:
        """Warm-up in updates: `warmup_steps`, or that share of all updates, rounded up."""
        return warmup_steps or math.ceil(warmup_ratio * self.n_windows)

    def __str__(self) -> str:
        """The arithmetic of the batch, as a paragraph."""
        b = self.batching
        whole = self.n_rows // b.effective_batch_size
        micro_batches = math.ceil(self.remainder_rows / b.batch_size)
        tail = (
            f"; the remainder of {self.remainder_rows} rows (micro-batches: {micro_batches}) is flushed as 1 more"
            if self.remainder_rows
            else ""
        )
        return "\n".join(
            [
                f"Training samples: {self.n_rows}",
                f"Batch size: {b.batch_size}",
                f"Gradient accumulation steps: {b.gradient_accumulation_steps}",
                f"Processes: {b.num_processes}",
                f"Effective batch size: {b.effective_batch_size}",
                f"Updates per epoch: {self.windows_per_epoch} ({whole} full windows{tail})",
                f"Epochs: {self.n_epochs}, {self.n_windows} updates in all",
                *([f"Validation samples: {self.n_validation_rows}"] if self.n_validation_rows else []),
            ]
        )


def hold_out(n_rows: int, share: float, seed: int) -> tuple[Rows, Rows]:
    """Splits row positions into (training, validation) by the seed, each in ascending order.

    The validation part has `share × n_rows` rows, rounded, and at least one where `share` is above 0.

    Raises:
        SettingsError: where nothing would be left to train on.
    """
    n_held = max(1, round(share * n_rows)) if share else 0
    if n_rows <= n_held:
        raise SettingsError(
            [f"`validation_split` {share} of {n_rows} rows leaves none to train on. Give more rows, or a split of 0."]
        )
    order = _permutation(n_rows, seed, _HOLD_OUT)
    held, kept = np.sort(order[:n_held]), np.sort(order[n_held:])
    return tuple(kept.tolist()), tuple(held.tolist())


def _permutation(n: int, *seed: int) -> np.ndarray:
    # NumPy's newer generators may change their stream between versions; the legacy one is frozen, and a run must
    # find its rows again after an upgrade.
    return np.random.RandomState(seed).permutation(n)


def _as_in(settings: type[Recipe] | type[Runtime], name: str) -> Any:
    same = settings.__dataclass_fields__[name]
    return setting(same.default, same.metadata["help"])


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """The arguments of `plan`, as settings: with rules, and flags for the command line."""

    n_rows: PositiveInt = setting(1000, "rows of the data, before the hold-out")
    batch_size: PositiveInt = setting(4, "rows of a micro-batch on one process (the physical batch)")
    gradient_accumulation_steps: PositiveInt = _as_in(Recipe, "gradient_accumulation_steps")
    effective_batch_size: PositiveInt | None = _as_in(Recipe, "effective_batch_size")
    tokens_per_update: PositiveInt | None = _as_in(Recipe, "tokens_per_update")
    tokens_per_row: Positive | None = setting(None, "mean length of the rows, needed with tokens_per_update")
    num_processes: PositiveInt = setting(1, "processes that `accelerate launch` would start")
    n_epochs: PositiveInt = _as_in(Recipe, "n_epochs")
    validation_split: Fraction = _as_in(Recipe, "validation_split")
    random_seed: Seed = _as_in(Recipe, "random_seed")


def plan(
    n_rows: int,
    *,
    batch_size: int = 4,
    gradient_accumulation_steps: int = 1,
    effective_batch_size: int | None = None,
    tokens_per_update: int | None = None,
    tokens_per_row: float | None = None,
    num_processes: int = 1,
    n_epochs: int = 3,
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
    given = dict(locals())
    faults = single_faults(PlanArguments(**given))
    if tokens_per_update is not None and tokens_per_row is None:
        faults.append("`tokens_per_update` needs `tokens_per_row`, which is None. Give the mean length of the rows.")
    if faults:
        raise SettingsError(faults)
    kept, held = hold_out(n_rows, validation_split, random_seed)
    sizes = {name: given[name] for name in inspect.signature(resolve_batching).parameters}
    return Plan(len(kept), n_epochs, resolve_batching(**sizes), random_seed, len(held))
