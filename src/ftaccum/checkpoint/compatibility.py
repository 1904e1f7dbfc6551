"""Compare a run with the run that wrote a checkpoint: settings, data, model and software."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import partial
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
from ..errors import CheckpointMismatchError
from ..fields import names_where
from ..planning.batch_size import BatchSizes
from ..runtime.sharding.layout import leading_values, unsharded_class
from ..runtime.state_guards import preserve_rng, seed_all
from ..settings.recipe import SIZES, Recipe
from ..settings.runtime import Runtime
from .best_weights import base_weights

FORMAT = 4  # version of the checkpoint files; other versions cannot be read
_LOOKED_AT = 16  # leading numbers of each frozen weight that identify it
_REPLACED = ".original_module."  # PEFT's name for a module whose trained copy takes its place
_NOT_LEARNING = {  # values of a PEFT configuration that do not change the training, or show in the weights
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "modules_to_save", "peft_version", "revision"),
    *("target_modules", "task_type"),
}
_MATTER_TO_ROUNDING = names_where(Runtime, lambda traits: traits.matters_to_rounding)
_RATES = {"lr", "initial_lr"}  # compared through the settings instead
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class RunIdentity:
    """The properties of a run that must not change when it resumes, and those that may.

    Attributes:
        recipe: values of the Recipe, by setting, without those that set the size of an update.
        trained_on: everything else that must not change, by the names that `allow_changed` accepts. Parts of one of
            these have its name, a dot and their own, such as "loss_fn.gamma".
        run_with: what may change, because it affects only time and memory.
        n_rows: number of training rows.
        versions: versions of the packages that compute the run.
    """

    recipe: dict[str, Any]
    trained_on: dict[str, Any]
    run_with: dict[str, Any]
    n_rows: int
    versions: dict[str, str]

    def as_metadata(self) -> dict[str, Any]:
        """Return the metadata that a checkpoint stores about its run."""
        return {"format": FORMAT, **asdict(self)}


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of a Recipe, without those that set the size of an update."""
    return {name: value for name, value in asdict(recipe).items() if name not in SIZES}


def size_identity(batch_sizes: BatchSizes) -> Any:
    """Return the rows per update or, if they change during the run, pairs [from_update, rows]."""
    stages = [[update, sizes.effective_batch_size] for update, sizes in batch_sizes.stages()]
    return stages if len(stages) > 1 else stages[0][1]


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that compute a run."""
    return {"ftaccum": __version__, **{name: version(name) for name in ("torch", "transformers", "accelerate")}}


def rounding_settings(runtime: Runtime) -> dict[str, Any]:
    """Return the settings of a Runtime that matter to rounding."""
    return {name: getattr(runtime, name) for name in _MATTER_TO_ROUNDING}


def rows_identity(rows: Rows | None) -> str | None:
    """Return the number of rows and a checksum of all row lengths and of a sample of rows.

    Rows that differ each time they are fetched contribute only their lengths.
    """
    if rows is None:
        return None
    checksum = hashlib.sha256(np.array(rows.lengths() or []).tobytes())
    positions = sample_positions(rows)
    one = _looked_at(rows, positions)
    if rows.in_memory or one == _looked_at(rows, positions):
        checksum.update(one.encode())
    return f"{len(rows)} rows ({checksum.hexdigest()[:8]})"


def model_identity(model: nn.Module) -> str:
    """Return a model's class, its numbers of weights and a checksum of their names, shapes and types.

    It is the same whether the model is sharded or not. If it is, all processes must call this together.
    """
    weights = list(model.named_parameters())
    shapes = repr([(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in weights])
    if left_out := base_weights(model):  # of the checkpoint
        frozen = [p for name, p in weights if p in left_out and _REPLACED not in name]
        shapes += repr(leading_values(frozen, _LOOKED_AT))
    trained = sum(p.numel() for _, p in weights if p.requires_grad)
    total = sum(p.numel() for _, p in weights)
    checksum = hashlib.sha256(shapes.encode()).hexdigest()[:8]
    return f"{unsharded_class(model).__name__} with {total:,} weights, {trained:,} of them trained ({checksum})"


def adapter_identity(model: nn.Module) -> str | None:
    """Return the configurations of the adapters in a model, also of PEFT models inside of it; None without any."""
    held = (getattr(module, "peft_config", None) for module in model.modules())
    found = {
        id(configs): configs for configs in held if isinstance(configs, Mapping)
    }  # a PEFT model has it in 3 places
    if not found:
        return None
    named = {
        name: ", ".join(f"{n}={_named(v)}" for n, v in sorted(vars(config).items()) if _shapes_learning(n, v))
        for configs in found.values()
        for name, config in configs.items()
    }
    return "; ".join(f"{name}: {values}" for name, values in named.items())


def _shapes_learning(name: str, value: Any) -> bool:
    return name not in _NOT_LEARNING and value not in (None, {}, False)


def optimizer_identity(optimizer: Optimizer) -> str:
    """Return an optimizer's class and its hyperparameters by group, without learning rates."""
    groups = [
        {name: v for name, v in group.items() if name not in {"params", *_RATES}} for group in optimizer.param_groups
    ]
    numbers = [", ".join(f"{name}={_named(value)}" for name, value in group.items()) for group in groups]
    return f"{type(optimizer).__name__}({' | '.join(numbers)})"


def function_identity(function: Any) -> str | None:
    """Return the name of a function, the representation of a module, which shows its options, or another class name."""
    if isinstance(function, nn.Module):
        return repr(function)
    return None if function is None else getattr(function, "__qualname__", type(function).__name__)


def function_options(function: Any) -> dict[str, Any]:
    """Return the plain values that a function is called with, by name: those of a `partial`, or of a dataclass."""
    if isinstance(function, partial):
        given: dict[Any, Any] = {**dict(enumerate(function.args)), **function.keywords}
        given["func"] = function_identity(function.func)
    elif is_dataclass(function) and not isinstance(function, nn.Module):
        given = {f.name: getattr(function, f.name, None) for f in fields(function)}
    else:
        return {}
    return {str(name): value for name, value in given.items() if _is_plain(value)}


def config_identity(model: nn.Module) -> dict[str, Any]:
    """Return the decimal numbers in a model's configuration, such as that of dropout, and the dropout of its modules.

    Names and whole numbers in it are left out: most of them show in the weights, depend on the version of Transformers,
    or only say how the model is computed.
    """
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, _DROPOUTS)]
    counts = Counter(module.p for name, module in named if "lora_" not in name)  # that of adapters is among theirs
    dropouts = ", ".join(f"{p:g} ({n} modules)" for p, n in sorted(counts.items()))
    to_dict = getattr(getattr(model, "config", None), "to_dict", dict)
    return {"dropout of modules": dropouts, **_decimals(to_dict())}


def _decimals(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _decimals(value, f"{prefix}{name}.")
        elif isinstance(value, float) and math.isfinite(value):
            found[f"{prefix}{name}"] = value
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or (type(value) in (bool, int, float, str) and value == value)


def check(was: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str], checkpoint: Path) -> set[str]:
    """Return the names in which a run differs from a checkpoint, if all of them are allowed to differ.

    Args:
        was, now: values by name. Only names in both are compared. A part, such as "loss_fn.gamma", may differ if the
            whole may, here "loss_fn".

    Raises:
        CheckpointMismatchError: if other values differ; the message shows both values of each.
    """
    changed = {name for name in was.keys() & now.keys() if _plain(was[name]) != _plain(now[name])}
    if refused := sorted(name for name in changed if _whole(name) not in allowed):
        pairs = [f"`{name}` was {was[name]!r}, but is {now[name]!r} now." for name in refused]
        if isinstance(was.get("effective_batch_size"), int) and "effective_batch_size" in refused:
            pairs.append(
                "To keep the size of an update with another number of processes or another `batch_size`, set "
                f"`effective_batch_size={was['effective_batch_size']}`."
            )
        wholes = list(dict.fromkeys(map(_whole, refused)))
        wanted = ", ".join(map(repr, wholes))
        raise CheckpointMismatchError(
            f"`resume` found {checkpoint}, but that run had other settings. Use the same settings, start a new run "
            f"(`resume=None`), or allow the change: `allow_changed=[{wanted}]` "
            f"(`--allow_changed {','.join(wholes)}`).",
            pairs,
        )
    return set(map(_whole, changed))


def _whole(name: str) -> str:
    return name.partition(".")[0]


def _named(value: Any) -> str:
    """Return the repr of a value without memory addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _plain(value: Any) -> Any:
    """Return a value as it looks after a round trip through JSON."""
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _looked_at(rows: Rows, positions: list[int]) -> str:
    with preserve_rng():
        seed_all(0)
        return Hasher.hash(rows.fetch(positions))
