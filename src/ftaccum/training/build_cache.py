"""The cache of the self-check's verdicts, as the settings want it."""

import os
from pathlib import Path
from typing import Any

from ..objective.sample import Sample
from ..objective.self_check_cache import VerdictCache
from ..objective.self_check_key import key_of
from ..runtime.accelerator import is_first_process
from .config import RunConfig
from .declared import class_weights_of


def build_cache(config: RunConfig, loss_fn: Any, sample: Sample, ignore_index: int) -> VerdictCache | None:
    """Return the cache for the verdict on a loss; None if it must not be cached, and on all but the first process.

    Args:
        loss_fn: the function that computes the loss; None for the model's own.
        sample: the rows to measure on.
        ignore_index: the label that the loss is known to ignore.
    """
    components, recipe, wanted = config.components, config.recipe, config.runtime.self_check_cache
    if not wanted or components.count_items is not None or components.reduction == "sum" or not is_first_process():
        return None
    weights = class_weights_of(components.model, loss_fn)
    settings = {
        "ignore_index": ignore_index,
        "class_weights": None if weights is None else weights.tolist(),
        "router_balance": recipe.router_balance,
        "label_smoothing": recipe.label_smoothing,
    }
    key = key_of(components.model, loss_fn, sample, settings)
    if key is None:
        return None
    folder = _default_folder() if wanted is True else Path(str(wanted))
    return None if folder is None else VerdictCache(folder, key)


def _default_folder() -> Path | None:
    """Return the user's cache folder; None for a user without a home, as in some containers."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftaccum" / "self_check"
    except RuntimeError:
        return None
