"""The study that belongs to a search."""

from dataclasses import fields
from typing import Any

from optuna import Study
from optuna.storages import BaseStorage

from ...settings import Recipe
from .definition import Search
from .space import STEPS
from .storages import storage_of
from .study import open_or_create


def open_study(search: Search, num_processes: int) -> tuple[Study, BaseStorage]:
    """The study of a search, begun where it is not yet there, and the storage that it is in.

    Raises:
        SettingsError: where the storage cannot be opened, or the study was begun with other settings.
    """
    if search.folder is not None:
        search.folder.mkdir(parents=True, exist_ok=True)
    storage = storage_of(search.settings.storage, search.folder)
    name = search.settings.study_name or (search.folder.resolve().name if search.folder else "search")
    return open_or_create(
        storage, name, search.settings, _setup(search, num_processes), search.space.dimensions(), {STEPS: 1}
    ), storage


def _setup(search: Search, num_processes: int) -> dict[str, Any]:
    """What trials must have in common to be compared: the Recipe, but for what is searched, and where they report."""
    settings = search.settings
    recipe = {f.name: search.fixed[f.name] for f in fields(Recipe) if f.name not in search.space.dimensions()}
    return {
        **recipe,
        "batch_size": search.fixed["batch_size"],
        "num_processes": num_processes,
        "accumulation_steps": search.space.candidates(),
        "couple_learning_rate": settings.couple_learning_rate,
        "couple_beta2": settings.couple_beta2,
        "reference_batch_size": settings.reference_batch_size,
        "n_reports": settings.n_reports,
        "trade_time": settings.trade_time,
    }
