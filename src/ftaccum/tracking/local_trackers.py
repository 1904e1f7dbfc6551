"""Trackers of Accelerate that keep their files in a run's folder, and continue there when the run is resumed."""

import os
import re
import time
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, MLflowTracker, WandBTracker

from ..runtime.log import logger

PROJECT = "ftaccum"
# MLflow takes 100 parameters at once, older servers 500 characters of each, and names only with certain characters.
_MOST_PARAMS, _LONGEST_PARAM = 100, 500
_REFUSED = re.compile(r"[^\w\-. :/]", re.ASCII)
# In errors of W&B without a login. Versions differ in the wording.
_NO_LOGIN = re.compile("api[ _]key", re.IGNORECASE)
_OFFLINE = (
    "W&B has no API key, so the run is kept offline. `wandb sync {folder}` uploads it. Use `wandb login` before a run "
    "to upload while it trains."
)


def local_tracker(name: str, folder: Path | None) -> GeneralTracker | None:
    """Return the tracker of a name that a run creates differently from Accelerate, or None for another name.

    Args:
        folder: the folder for the files of the run's trackers. It exists if a resumed run continues there. None if the
            run writes no files.
    """
    create = {"wandb": _LocalWandB, "mlflow": _LocalMLflow, "trackio": _local_trackio}.get(name)
    return None if create is None else create(folder)


class _StoredId:
    """The id of a tracker's run, in a file, so that a resumed run continues the same run."""

    def __init__(self, folder: Path | None, tracker: str) -> None:
        self._path = None if folder is None else folder / f"{tracker}.id"

    def read(self) -> str | None:
        return self._path.read_text().strip() if self._path is not None and self._path.exists() else None

    def write(self, found: str) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(f"{found}\n")


class _LocalWandB(WandBTracker):
    """W&B with its files in the run's folder, unless `WANDB_DIR` is set. Without a login it works offline."""

    def __init__(self, folder: Path | None) -> None:
        self._stored = _StoredId(folder, "wandb")
        options: dict[str, Any] = {}
        if folder is not None and "WANDB_DIR" not in os.environ:
            folder.mkdir(parents=True, exist_ok=True)  # W&B would write somewhere else
            options["dir"] = str(folder)
        if "WANDB_RUN_ID" not in os.environ and (known := self._stored.read()) is not None:
            options |= {"id": known, "resume": "allow"}
        super().__init__(PROJECT, **options)

    def start(self) -> None:
        import wandb

        try:
            super().start()
        except wandb.errors.UsageError as error:
            if not _NO_LOGIN.search(str(error)):
                raise
            self.init_kwargs["mode"] = "offline"
            super().start()
            logger.warning(_OFFLINE.format(folder=Path(self.run.dir).parent))
        self._stored.write(self.run.id)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.run.config.update(values, allow_val_change=True)  # older versions of Accelerate restart an offline run


class _LocalMLflow(MLflowTracker):
    """MLflow with a database in the run's folder, unless a tracking URI is set.

    It uses a client of its own. MLflow's functions would use the URI and the current run of the whole Python process,
    which are the user's.
    """

    def __init__(self, folder: Path | None) -> None:
        import mlflow

        self._stored, self._uri, artifacts = _StoredId(folder, "mlflow"), None, None
        if folder is not None and not mlflow.is_tracking_uri_set():
            folder.mkdir(parents=True, exist_ok=True)
            self._uri, artifacts = f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri()
        super().__init__(PROJECT, logging_dir=artifacts, run_id=self._stored.read())

    def start(self) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(self._uri)
        if self.run_id is None:
            experiment = self._client.get_experiment_by_name(self.experiment_name)
            number = (
                self._client.create_experiment(self.experiment_name, self.logging_dir)
                if experiment is None
                else experiment.experiment_id
            )
            self.active_run = self._client.create_run(number, tags=self.tags)
        else:
            self._client.update_run(self.run_id, status="RUNNING")
            self.active_run = self._client.get_run(self.run_id)
        self._id = self.active_run.info.run_id
        self._stored.write(self._id)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Store the settings, except those that a resumed run has stored before: MLflow keeps the first value."""
        from mlflow.entities import Param

        known = self.active_run.data.params
        new = [Param(name, str(value)[:_LONGEST_PARAM]) for name, value in values.items() if name not in known]
        for start in range(0, len(new), _MOST_PARAMS):
            self._client.log_batch(self._id, params=new[start : start + _MOST_PARAMS])

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(_REFUSED.sub("_", name), value, now, step or 0) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self) -> None:
        self._client.set_terminated(self._id)


def _local_trackio(folder: Path | None) -> GeneralTracker:
    """Return a tracker for trackio, which keeps all runs where `TRACKIO_DIR` says, so that its dashboard finds them."""
    from accelerate.tracking import TrackioTracker  # not in older versions

    class LocalTrackio(TrackioTracker):
        def start(self) -> None:
            super().start()
            stored.write(self.run.name)

    stored = _StoredId(folder, "trackio")
    known = stored.read()
    return LocalTrackio(PROJECT, **({} if known is None else {"name": known, "resume": "allow"}))
