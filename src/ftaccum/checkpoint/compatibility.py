"""Whether a run is the one that a checkpoint was made in: what it learns, on what, and how."""

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from datasets.fingerprint import Hasher
from torch import nn
from torch.optim import Optimizer

from .. import __version__
from ..data.dataset import Rows
from ..data.probe_rows import sample_positions
from ..errors import CheckpointError
from ..fields import names_where
from ..planning.batch_size import BatchSizes
from ..runtime.state_guards import preserve_rng, seed_all
from ..settings import SIZES, Recipe, Runtime

FORMAT = 3  # of a checkpoint's files; another one cannot be read
_LOOKED_AT = 16  # numbers of a weight; numbers of a weight
_MATTER_TO_ROUNDING = names_where(Runtime, lambda traits: traits.matters_to_rounding)
_RATES = {"lr", "initial_lr"}  # which the settings and the schedule say


@dataclass(frozen=True)
class RunIdentity:
    """What makes a run the same run when it is resumed, and what may differ.

    Attributes:
        recipe: what is learned, by setting.
        trained_on: the rest of what must not change, by the names that `allow_changed` knows.
        run_with: what may change: time and memory.
        n_rows: training rows.
        versions: versions of the packages that compute it.
    """

    recipe: dict[str, Any]
    trained_on: dict[str, Any]
    run_with: dict[str, Any]
    n_rows: int
    versions: dict[str, str]

    def as_metadata(self) -> dict[str, Any]:
        """Return what a checkpoint says about its run."""
        return {"format": FORMAT, **asdict(self)}


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """What is learned, by setting, but for the size of an update."""
    return {name: value for name, value in asdict(recipe).items() if name not in SIZES}


def size_identity(batch_sizes: BatchSizes) -> Any:
    """Rows of an update; where they change, pairs [from_update, rows]."""
    stages = [[update, sizes.effective_batch_size] for update, sizes in batch_sizes.stages()]
    return stages if len(stages) > 1 else stages[0][1]


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that compute a run."""
    return {"ftaccum": __version__, **{name: version(name) for name in ("torch", "transformers", "accelerate")}}


def rounding_settings(runtime: Runtime) -> dict[str, Any]:
    """Return the settings of a Runtime that matter to rounding."""
    return {name: getattr(runtime, name) for name in _MATTER_TO_ROUNDING}


def rows_identity(rows: Rows | None) -> str | None:
    """How many rows, and a checksum of those that are looked at before training and of the lengths of all. (Rows that
    are drawn anew each time they are fetched have none of themselves.)"""
    if rows is None:
        return None
    checksum = hashlib.sha256(np.array(rows.lengths() or []).tobytes())
    one, other = (_looked_at(rows, sample_positions(rows)) for _ in range(2))
    if one == other:
        checksum.update(one.encode())
    return f"{len(rows)} rows ({checksum.hexdigest()[:8]})"


def model_identity(model: nn.Module) -> str:
    """The shapes, types and names of its weights, and how many are trained."""
    weights = list(model.named_parameters())
    shapes = repr([(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in weights])
    if hasattr(model, "peft_config"):  # those that are not trained are not in the checkpoint
        shapes += repr([p.flatten()[:_LOOKED_AT].tolist() for _, p in weights if not p.requires_grad])
    trained = sum(p.numel() for _, p in weights if p.requires_grad)
    total = sum(p.numel() for _, p in weights)
    checksum = hashlib.sha256(shapes.encode()).hexdigest()[:8]
    return f"{type(model).__name__} with {total:,} weights, {trained:,} of them trained ({checksum})"


def optimizer_identity(optimizer: Optimizer) -> str:
    """Its kind and its numbers, group by group, but for the rates."""
    groups = [
        {name: v for name, v in group.items() if name not in {"params", *_RATES}} for group in optimizer.param_groups
    ]
    numbers = [", ".join(f"{name}={_named(value)}" for name, value in group.items()) for group in groups]
    return f"{type(optimizer).__name__}({' | '.join(numbers)})"


def function_identity(function: Any) -> str | None:
    """The name of a function, or of what kind of thing is called."""
    return None if function is None else getattr(function, "__qualname__", type(function).__name__)


def check(was: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str], checkpoint: Path) -> set[str]:
    """The names under which a run differs from that of a checkpoint, if all of them are allowed.

    Args:
        was, now: values by name; a name that is not in `was` is not compared.

    Raises:
        CheckpointError: showing each pair of values that is not allowed to differ.
    """
    changed = {name for name in was.keys() & now.keys() if _plain(was[name]) != _plain(now[name])}
    if refused := sorted(changed - set(allowed)):
        pairs = [f"`{name}` was {was[name]!r}, and is {now[name]!r}." for name in refused]
        if isinstance(was.get("effective_batch_size"), int) and "effective_batch_size" in refused:
            pairs.append(
                "On other processes, or with another `batch_size`, updates stay as large with "
                f"`effective_batch_size={was['effective_batch_size']}`."
            )
        wanted = ", ".join(map(repr, refused))
        raise CheckpointError(
            [
                f"`resume` found {checkpoint}, but of a run with other settings. Give the same ones, or start anew "
                f"(`resume=None`), or allow the change: `allow_changed=[{wanted}]`.",
                *pairs,
            ]
        )
    return changed


def _named(value: Any) -> str:
    """Without the address in memory, which what is no number is shown with."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _looked_at(rows: Rows, positions: list[int]) -> str:
    with preserve_rng():
        seed_all(0)
        return Hasher.hash(rows.fetch(positions))
