"""Trackers that raise or hang: they do not affect the run, and a warning reports what they missed."""

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType

from ftaccum import OutputWarning, Result, SettingsError, test_fine_tuning
from ftaccum.tracking import trackers
from heads import HEADS
from interrupted import fine_tuned

CLASSIFIER = HEADS["sequence classification, BERT"]


class Told(GeneralTracker):
    """A tracker that records its calls and their threads. `trouble` may raise or hang in any call."""

    requires_logging_directory, tracker = False, None

    def __init__(self, trouble: Callable[[str], object] = lambda _: None, name: str = "mine") -> None:
        self.name, self.trouble = name, trouble
        super().__init__()
        self.done: list[str] = []
        self.threads: dict[str, threading.Thread] = {}
        self.config: dict[str, Any] = {}
        self.losses: list[float] = []
        self.steps: list[int | None] = []

    def _do(self, name: str) -> None:
        self.done.append(name)
        self.threads[name] = threading.current_thread()
        self.trouble(name)

    def start(self) -> None:
        self._do("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._do("config")
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self._do("log")
        self.steps.append(step)
        if "train/loss" in values:
            self.losses.append(values["train/loss"])

    def finish(self) -> None:
        self._do("finish")


def failing_in(name: str, in_nth: Callable[[int], object] = lambda _: True) -> Callable[[str], None]:
    """Return a `trouble` that raises in calls of one kind, counted from 1."""
    calls: list[str] = []

    def trouble(done: str) -> None:
        calls.append(done)
        if done == name and in_nth(calls.count(name)):
            raise ConnectionError(f"no line in {name}")

    return trouble


def run(log_with: Any = None) -> Result:
    """Run 12 updates in 2 epochs with two audits: 16 entries."""
    return test_fine_tuning(
        CLASSIFIER.model().double(), train_data=CLASSIFIER.rows(24), validation_split=0.0, n_epochs=2, batch_size=2,
        gradient_accumulation_steps=2, log_with=log_with, log_every=1, audit=6, progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone() -> Result:
    return run()


@pytest.fixture
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_SECONDS_AT_THE_END", 0.3)


@pytest.mark.slow
def test_a_tracker_gets_all_calls_in_order_from_its_own_thread(alone: Result) -> None:
    tracker = Told()
    assert run(tracker).loss_history == alone.loss_history == tracker.losses
    assert tracker.done == ["start", "config", *16 * ["log"], "finish"]
    assert tracker.steps == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        6,
        6,
        7,
        8,
        9,
        10,
        11,
        12,
        12,
    ]  # an audit has the step of the update before it
    assert tracker.config["n_epochs"] == 2
    (thread,) = set(tracker.threads.values())  # MLflow has one current run per thread
    assert thread is not threading.main_thread()
    assert not thread.is_alive()


def test_the_run_continues_without_a_tracker_that_cannot_start(alone: Result) -> None:
    def exits(_: str) -> None:
        raise SystemExit("not logged in")

    other = Told(name="other")
    with pytest.warns(OutputWarning) as told:
        result = run([Told(failing_in("start")), Told(exits, name="exits"), other])
    assert [str(w.message) for w in told] == [
        "The tracker 'mine' could not be started, and the run continues without it: ConnectionError: no line in start",
        "The tracker 'exits' could not be started, and the run continues without it: SystemExit: not logged in",
    ]
    assert {w.filename for w in told} == {__file__}
    assert result.loss_history == alone.loss_history == other.losses


def test_a_tracker_that_raises_is_reported_once_and_tried_again(alone: Result) -> None:
    tracker = Told(failing_in("log", lambda n: n % 5))
    with pytest.warns(OutputWarning) as told:
        result = run(tracker)
    assert [str(w.message) for w in told] == ["The tracker 'mine' raised in `log`: ConnectionError: no line in log"]
    assert {w.filename for w in told} == {__file__}
    assert result.loss_history == alone.loss_history
    assert tracker.done == ["start", "config", *16 * ["log"], "finish"]
    assert tracker.steps == [4, 7, 12]  # of every fifth entry


@pytest.mark.parametrize("name", ["config", "finish"])
def test_a_tracker_that_raises_once_gets_the_remaining_calls(name: str, alone: Result) -> None:
    tracker = Told(failing_in(name))
    with pytest.warns(OutputWarning, match="The tracker 'mine' raised in `.*`: ConnectionError: no line in") as told:
        run(tracker)
    assert len(told) == 1
    assert tracker.losses == alone.loss_history
    assert tracker.done[-1] == "finish"


def test_a_tracker_that_always_raises_is_dropped_and_finished(alone: Result) -> None:
    tracker, other = Told(failing_in("log")), Told(name="other")
    with pytest.warns(OutputWarning) as told:
        result = run([tracker, other])
    assert [str(w.message) for w in told] == [
        "The tracker 'mine' raised in `log`: ConnectionError: no line in log",
        "The tracker 'mine' raised 5 times in a row. The run continues without it.",
    ]
    assert tracker.done == ["start", "config", *5 * ["log"], "finish"]
    assert result.loss_history == alone.loss_history == other.losses


@pytest.mark.parametrize(("name", "lost"), [("log", 16), ("finish", 0)])
@pytest.mark.usefixtures("short_wait")
def test_a_tracker_that_hangs_affects_neither_the_run_nor_other_trackers(name: str, lost: int, alone: Result) -> None:
    waits = threading.Event()
    tracker, other = Told(lambda done: done == name and waits.wait()), Told(name="other")
    with pytest.warns(OutputWarning) as told:
        result = run([tracker, other])
    assert [str(w.message) for w in told] == [
        f"The tracker 'mine' is still in `{name}`, 0.3 s after the end of the run. The run no longer waits for it: "
        f"{lost} entries are lost, and the tracker is not finished."
    ]
    assert result.loss_history == alone.loss_history == other.losses
    assert other.done[-1] == "finish"
    waits.set()  # a tracker that wakes up late must not disturb the next run
    tracker.threads[name].join(5)
    assert tracker.done.count("log") == (1 if name == "log" else 16)
    assert tracker.done.count("finish") == (name == "finish")


@pytest.mark.parametrize("comes_too_late", [False, True])
def test_a_tracker_that_starts_late_gets_the_entries_that_it_missed(
    comes_too_late: bool, alone: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_SECONDS_AT_THE_START", 0.2)
    monkeypatch.setattr(trackers, "_SECONDS_AT_THE_END", 0.2 if comes_too_late else 30)
    waits, other = threading.Event(), Told(name="other")
    hangs = Told(lambda done: done == "start" and waits.wait())
    other.trouble = lambda done: done == "log" and not comes_too_late and waits.set()
    with pytest.warns(OutputWarning) as told:
        result = run([hangs, other])
    assert [str(w.message) for w in told] == [
        "The tracker 'mine' has not started within 0.2 s, and the run continues. Entries wait until the "
        "tracker has started.",
        "The tracker 'mine' is still in `start`, 0.2 s after the end of the run. The run no longer waits for it: 17 "
        "entries are lost, and the tracker is not finished.",
    ][: 1 + comes_too_late]
    assert {w.filename for w in told} == {__file__}
    assert result.loss_history == alone.loss_history == other.losses
    waits.set()
    hangs.threads["start"].join(5)
    assert hangs.done == ["start"] + ([] if comes_too_late else ["config", *16 * ["log"], "finish"])


def test_a_tracker_whose_start_fails_late_is_reported_and_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_SECONDS_AT_THE_START", 0.1)
    waits, other = threading.Event(), Told(lambda done: done == "log" and waits.set(), name="other")

    def fails_late(_: str) -> None:
        waits.wait()
        raise ConnectionError("no line")

    with pytest.warns(OutputWarning) as told:
        run([Told(fails_late), other])
    assert [str(w.message).split(", and")[0] for w in told] == [
        "The tracker 'mine' has not started within 0.1 s",
        "The tracker 'mine' could not be started",
    ]


def test_the_run_waits_for_a_slow_tracker(alone: Result) -> None:
    tracker = Told(lambda _: time.sleep(0.05))
    run(tracker)
    assert tracker.losses == alone.loss_history
    assert tracker.done[-1] == "finish"


@pytest.mark.usefixtures("short_wait")
def test_waiting_entries_are_bounded_and_the_oldest_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_MOST_WAITING", 3)
    waits = threading.Event()
    tracker = Told(lambda done: done == "config" and waits.wait())
    apart = trackers._BackgroundTracker("mine", lambda: tracker)
    apart.store_init_configuration({})
    while "config" not in tracker.done:
        time.sleep(0.01)
    for step in range(3):
        apart.log({}, step=step)
    with pytest.warns(OutputWarning, match="'mine' is 3 entries behind. From now on, the oldest are lost."):
        apart.log({}, step=3)
    for step in (4, 5):
        apart.log({}, step=step)  # not reported again: a warning would be an error here
    waits.set()
    apart.finish()
    apart.join(time.monotonic() + 5)
    assert tracker.steps == [3, 4, 5]


def test_trackers_are_finished_where_the_run_fails() -> None:
    tracker, rows, metrics = Told(), CLASSIFIER.rows(8), [{"accuracy": 0.5}]
    with pytest.raises(IndexError):  # there are metrics before the first update, and none after the epoch
        test_fine_tuning(
            CLASSIFIER.model(), train_data=rows, val_data=rows, compute_metrics=lambda _: metrics.pop(),
            log_with=tracker, log_every=1, progress=False,
        )  # fmt: skip
    assert tracker.done == ["start", "config", *4 * ["log"], "finish"]  # an evaluation, an audit and two updates


@pytest.mark.parametrize(
    ("asked", "absent"),
    [
        (["dvclive", "wandb"], "['wandb']"),
        (["wandb", "dvclive", "mlflow"], "['wandb', 'mlflow']"),
        ([LoggerType.WANDB, LoggerType.DVCLIVE], "['wandb']"),
        ("mlflow", "['mlflow']"),
    ],
)
def test_only_trackers_that_are_not_installed_are_reported_as_missing(
    asked: Any, absent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.DVCLIVE])
    with pytest.raises(SettingsError, match=re.escape(f"The trackers {absent} were requested, but are not installed")):
        run(asked)


def test_a_tracker_may_be_named_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.DVCLIVE])
    with pytest.warns(OutputWarning, match="'dvclive' could not be started") as warned:
        assert run(["dvclive", "dvclive"]).optimizer_steps
    assert len(warned) == 1


class InFiles(Told):
    """A tracker that writes a file, as that of TensorBoard does."""

    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        folder = Path(logging_dir, run_name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"events.{len(list(folder.iterdir()))}").touch()


@pytest.mark.slow
def test_each_run_in_a_folder_gets_its_own_tracker_folder_and_a_resumed_one_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftaccum.runtime.accelerator.filter_trackers", lambda asked, _: asked)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", InFiles)

    def files(**arguments: Any) -> list[str]:
        fine_tuned(output_dir=str(tmp_path / "run"), log_with="tensorboard", max_updates=1, audit=False, **arguments)
        there = tmp_path / "run" / "trackers"
        return sorted(path.relative_to(there).as_posix() for path in there.rglob("events.*"))

    first, second = "1/ftaccum/events.0", "2/ftaccum/events.0"
    assert files() == [first]
    assert files() == [first, second]
    more = files(resume="auto")
    assert more == [first, second, "2/ftaccum/events.1"]
    fine_tuned(output_dir=str(tmp_path / "other"), max_updates=1, audit=False)
    assert files(resume=str(tmp_path / "other")) == [*more, "3/ftaccum/events.0"]  # not a run of this folder
