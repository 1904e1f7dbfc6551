"""What a model card says of a run, as plain values."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from ..rules.repository import is_repository_name
from .curves import with_loss

_IN_HUB_CACHE = re.compile(r"models--([\w.-]+?)(?:--([\w.-]+))?[/\\]snapshots[/\\]")


@dataclass(frozen=True)
class Named:
    """A model or a data set under the name that may be published.

    Attributes:
        name: the name on the hub; of a file or folder on this machine, only the last component of its path.
        on_hub: whether it is a name on the hub.
        config, split: the configuration and the split of a data set on the hub, if they are known.
    """

    name: str
    on_hub: bool = False
    config: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """An evaluation on a card: its names, the number of updates before it, its loss and its metrics."""

    name: str
    update: int
    loss: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RunMetadata:
    """What a model card says of a run.

    Attributes:
        name: the name of the model.
        repository: the repository on the hub that the model is uploaded to, if any.
        base: the model that was fine-tuned, if it has a name.
        train_data, val_data: the data, if they have names.
        n_train, n_val: numbers of rows; None if unknown, as for a stream, or if there are none.
        max_train_rows: most rows that were read of the training data; None for all.
        held_out: whether the validation rows were held out of the training data.
        sizes: the sizes of an update, by name.
        cut: how updates are split into micro-batches.
        hyperparameters: the other settings, by name.
        result: the attributes of the `Result`.
        criterion: the name of the metric that decides which evaluation is the best.
        loss: what the loss is a mean over, as a sentence.
        inexact: None if accumulating the loss is exact; else the largest relative difference that was measured, or 0
            if it is unknown.
        versions: versions of packages, by name.
        device: the kind of device.
        ended_by: why the run ended early, as a sentence; empty if it did not.
        is_evaluated: whether the saved weights are those of an evaluation, which callbacks may prevent.
    """

    name: str
    repository: str | None
    base: Named | None
    train_data: Sequence[Named]
    val_data: Sequence[Named]
    n_train: int | None
    n_val: int | None
    max_train_rows: int | None
    held_out: bool
    sizes: Mapping[str, str]
    cut: str
    hyperparameters: Mapping[str, str]
    result: Mapping[str, Any]
    criterion: str
    loss: str
    inexact: float | None
    versions: Mapping[str, str]
    device: str
    ended_by: str = ""
    is_evaluated: bool = True

    def evaluations(self) -> list[Evaluation]:
        """Return the evaluation before training, and the best and the last one; those that are the same only once."""
        evaluations, best = self._all(), self.result["best_update"]
        if not evaluations:
            return []
        last, names = evaluations[-1], {evaluations[-1].update: "last"}
        if best is not None:
            names[best] = "best, last" if best == last.update else "best"
        first = Evaluation("before training", 0, self.result["initial_loss"], self.result["initial_metrics"])
        return [first, *(replace(each, name=names[each.update]) for each in evaluations if each.update in names)]

    def saved_evaluation(self) -> dict[str, float]:
        """Return the loss and the metrics of the saved weights on the validation rows; empty if they are unknown."""
        if not self.is_evaluated:
            return {}
        result, restored = self.result, self.result["restored_update"]
        update = result["optimizer_steps"] + result["skipped_steps"] if restored is None else restored
        saved = next((each for each in reversed(self._all()) if each.update == update), None)
        return {} if saved is None else with_loss(saved.loss, saved.metrics, "loss")

    def _all(self) -> list[Evaluation]:
        result = self.result
        columns = zip(result["evaluation_updates"], result["val_loss_history"], result["metrics"], strict=True)
        return [Evaluation("", update, loss, metrics) for update, loss, metrics in columns]


def public_name(path: str) -> str:
    """Return the last component of a path; "model" if there is none, or if it is the name of the user's home folder.

    Of an address, it leaves out the query and the fragment, which may have a token, and credentials before the host.
    """
    if "://" in path:
        path = _path_of(path)
    last = (PureWindowsPath(path) if "\\" in path else PurePath(path)).name
    return last if last.strip(".~") and last != _home() else "model"


def named_model(name: str | None) -> Named | None:
    """Return a model under the name that may be published, given the name or path that it was loaded from."""
    if not name:
        return None
    if cached := _IN_HUB_CACHE.search(name):
        return Named("/".join(part for part in cached.groups() if part), on_hub=True)
    if is_repository_name(name) and not Path(name).exists():
        return Named(name, on_hub=True)
    return Named(public_name(name))


def _path_of(address: str) -> str:
    """Return the path of an address, or else its host. Of a chain such as "zip://a.csv::s3://data/a.zip", the first."""
    first = next(part for part in address.split("::") if "://" in part)
    host, _, path = re.split(r"[?#;]", first.partition("://")[2], maxsplit=1)[0].partition("/")
    return path.rstrip("/") or host.rpartition("@")[2]


def _home() -> str | None:
    try:
        return Path.home().name
    except RuntimeError:  # unknown
        return None
