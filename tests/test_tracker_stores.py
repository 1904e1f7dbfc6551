"""Trackers without a network: the keys and values in their own stores are those of the run's ledger."""

import importlib.util
import json
import math
import re
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ftaccum import test_fine_tuning
from ftaccum.tracking.ledger import AuditEntry, EpochEntry, EvaluationEntry, Ledger, WindowEntry
from ftaccum.tracking.ledger_file import LedgerFile
from heads import HEADS

CLASSIFIER = HEADS["sequence classification, BERT"]
Stored = dict[tuple[str, int], float]  # by key and step


def metrics(_: Any) -> dict[str, float]:
    return {"accuracy (%)": 50.0, "undefined": math.nan}


def trained(folder: Path, tracker: Any, **arguments: Any) -> Ledger:
    """Train for two epochs of three updates, logging every third update. Return the ledger."""
    test_fine_tuning(
        CLASSIFIER.model(), train_data=CLASSIFIER.rows(11), val_data=CLASSIFIER.rows(3, seed=8), n_epochs=2,
        batch_size=2, effective_batch_size=4, compute_metrics=metrics, log_with=tracker, log_every=3, audit=2,
        progress=False, output_dir=str(folder), **arguments,
    )  # fmt: skip
    return LedgerFile.read(folder / "ledger.jsonl").ledger


def expected(ledger: Ledger, n_processes: int = 1) -> Stored:
    """Return what trackers should have of a run, computed from its ledger."""
    stored: Stored = {}

    def put(step: int, prefix: str, **values: float) -> None:
        stored.update({(f"{prefix}{name}", step): value for name, value in values.items()})

    for start in (0, 3):
        windows = ledger.windows[start : start + 3]
        loss = sum(w.loss * w.rows for w in windows) / sum(w.rows for w in windows)  # rows are the loss items
        put(start + 3, "train/", loss=loss, grad_norm=windows[-1].grad_norm, learning_rate=windows[-1].learning_rate)
        put(start + 3, "train/", grad_norm_max=max(w.grad_norm for w in windows), skipped=0)
        seconds = sum(w.data_seconds + w.pass_seconds + w.optimizer_seconds for w in windows)
        rows, tokens = sum(w.rows for w in windows), sum(w.tokens for w in windows)
        put(start + 3, "train/", rows_per_second=rows / seconds, tokens_per_second=tokens / seconds)
        put(start + 3, "train/", padding=1 - tokens / sum(w.positions for w in windows))
        put(start + 3, "train/", peak_memory_gb=max(w.peak_memory for w in windows) / 1e9)
    for epoch in ledger.epochs:
        step = 3 * (epoch.epoch + 1)
        put(step, "", epoch=epoch.epoch + 1)
        put(step, "train/", epoch_loss=epoch.train_loss)
        put(
            step, "config/", effective_batch_size=4, gradient_accumulation_steps=2 // n_processes, physical_batch_size=2
        )
    for found in ledger.evaluations:
        put(found.evaluation, "val/", loss=found.val_loss, **found.metrics)
    for audit in ledger.audits:
        put(audit.audit - 1, "audit/", error=audit.error, loss_error=audit.loss_error)
    return stored


def check(
    stored: Stored, ledger: Ledger, *, rel: float = 1e-12, rename: Callable[[str], str] = str, n_processes: int = 1
) -> None:
    wanted = {(rename(name), step): value for (name, step), value in expected(ledger, n_processes).items()}
    assert stored.keys() == wanted.keys()
    assert stored == pytest.approx(wanted, rel=rel, nan_ok=True)


def stored_in_tensorboard(folder: Path) -> Stored:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    return {(name, scalar.step): scalar.value for name in events.Tags()["scalars"] for scalar in events.Scalars(name)}


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    ledger = trained(tmp_path, "tensorboard")
    check(stored_in_tensorboard(tmp_path / "trackers" / "1" / "ftaccum"), ledger, rel=1e-6)  # stored in float32


def test_the_docs_have_all_keys() -> None:
    page = (Path(__file__).parents[1] / "docs" / "ledger.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`([^`]+)`", "\n".join(re.findall(r"^\|[^|]*\|", page, re.MULTILINE))))
    entry = partial(WindowEntry, rows=4, loss=1.0, terms={}, grad_norm=1.0, learning_rate=0.1, skipped=False, passes=2)
    windows = [entry(n, n // 3, tokens=6, positions=8, pass_seconds=1.0, peak_memory=1) for n in range(6)]
    ledger = Ledger()
    audit = AuditEntry(1, 0, 4, "one batch", 0.0, 0.0, 0.0, 0.0)
    ledger.resume_from([*windows, EpochEntry(0, 1.0), EvaluationEntry(6, 1, 24, 1.0, 1.0, {}), audit])
    assert {name for name, _ in expected(ledger)} <= documented


@pytest.mark.slow
@pytest.mark.processes
def test_the_main_process_stores_the_run_of_two(
    two_processes: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    names = ["tensorboard", *(name for name in ("wandb", "mlflow") if importlib.util.find_spec(name))]
    printed = two_processes("trackers_of_two.py", str(tmp_path / "run"), ",".join(names))
    started = json.loads(next(line for line in printed.splitlines() if line.startswith("STARTED"))[len("STARTED") :])
    assert [sorted(names), []] == [sorted(each) for each in started]
    ledger, folder = LedgerFile.read(tmp_path / "run" / "ledger.jsonl").ledger, tmp_path / "run" / "trackers" / "1"
    check(stored_in_tensorboard(folder / "ftaccum"), ledger, rel=1e-6, n_processes=2)
    if "wandb" in names:
        assert len(list(folder.glob("wandb/offline-run-*/*.wandb"))) == 1
    if "mlflow" in names:
        with sqlite3.connect(folder / "mlflow.db") as database:
            assert database.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)]


@pytest.fixture
def wandb_without_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.chdir(tmp_path)


def wandb_records(path: Path) -> Iterator[Any]:
    """Yield the records of an offline run: chunks with a header of checksum, length and type, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            parsed = wandb_internal_pb2.Record()
            parsed.ParseFromString(record)
            yield parsed
            record = b""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore", "error::ftaccum.OutputWarning")  # of older W&B with newer versions of Pydantic
@pytest.mark.usefixtures("wandb_without_login")
def test_wandb_without_a_login_keeps_a_resumed_run_offline(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    trained(folder, "wandb", max_updates=3)
    assert "W&B has no API key, so the run is kept offline. `wandb sync" in capfd.readouterr().err
    ledger = trained(folder, "wandb", max_updates=6, resume="auto", allow_changed=["max_updates"])
    parts = sorted((folder / "trackers" / "1" / "wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime)
    assert len(parts) == 2
    assert parts[0].name == parts[1].name  # the same run
    assert not (tmp_path / "wandb").exists()
    stored: Stored = {}
    for part in parts:
        for record in wandb_records(part):
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            step = items.pop("_step", None)
            stored |= {(name, step): float(value) for name, value in items.items() if name[0] != "_"}
            if record.WhichOneof("record_type") == "run":
                assert record.run.project == "ftaccum"
    check(stored, ledger)


@pytest.fixture
def mlflow_without_uri(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def stored_in_mlflow(client: Any) -> tuple[Stored, Any]:
    """Return the metrics of the only run, and the run."""
    (experiment,) = client.search_experiments(filter_string="name = 'ftaccum'")
    (run,) = client.search_runs([experiment.experiment_id])
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {(name, found.step): found.value for name, history in histories.items() for found in history}, run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore", "error::ftaccum.OutputWarning")  # of MLflow with newer versions of SQLAlchemy
@pytest.mark.usefixtures("mlflow_without_uri")
@pytest.mark.parametrize("has_uri", [False, True])
def test_mlflow_continues_a_resumed_run_in_a_local_store(has_uri: bool, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    folder = tmp_path / "run"
    uri = f"sqlite:///{tmp_path if has_uri else folder / 'trackers' / '1'}/mlflow.db"
    try:
        if has_uri:
            mlflow.set_tracking_uri(uri)
        trained(folder, "mlflow", max_updates=3)
        ledger = trained(folder, "mlflow", max_updates=6, resume="auto", allow_changed=["max_updates"])
        assert mlflow.is_tracking_uri_set() == has_uri
        assert mlflow.active_run() is None
    finally:
        mlflow.set_tracking_uri(None)
    stored, run = stored_in_mlflow(mlflow.MlflowClient(uri))
    assert (run.info.status, run.data.params["max_updates"], run.data.params["batch_size"]) == ("FINISHED", "3", "2")
    check(stored, ledger, rename=lambda name: name.replace("(%)", "___"))
    assert not (tmp_path / "mlruns").exists()
    assert (tmp_path / "mlflow.db").exists() == has_uri


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the folder of trackio, which reads its name once, on being imported."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        pytest.importorskip("trackio")
    return folder


@pytest.mark.slow
def test_trackio_continues_a_resumed_run(trackio_folder: Path, tmp_path: Path) -> None:
    trained(tmp_path / "run", "trackio", max_updates=3)
    ledger = trained(tmp_path / "run", "trackio", max_updates=6, resume="auto", allow_changed=["max_updates"])
    with sqlite3.connect(trackio_folder / "ftaccum.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert len({run_name for run_name, *_ in rows}) == 1
    stored = {(name, step): float(value) for _, step, values in rows for name, value in json.loads(values).items()}
    check(stored, ledger)
