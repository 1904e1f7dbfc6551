"""What appears on the screen: `verbosity`, the lines of other libraries, notebooks; and faults before a model loads."""

import csv
import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import transformers.utils.logging
from torch import nn
from transformers import BertForMaskedLM, BertTokenizerFast

import ftaccum.runtime.progress_bar
from ftaccum import SettingsError, search, test_fine_tuning, verify
from ftaccum.apps.cli import main
from ftaccum.runtime.library_output import library_bars, load_report_withheld
from ftaccum.runtime.log import logger, run_logging
from ftaccum.runtime.run_dir import RunDir
from ftaccum.tasks.arguments import TrainArguments
from ftaccum.tasks.load import load, loading
from ftaccum.tracking.ledger import WindowEntry
from ftaccum.tracking.progress import Progress
from ftaccum.training.preflight import faults_before_loading
from heads import HEADS
from searching import Layer, points, quick

MODELING = logging.getLogger("transformers.modeling_utils")
REPORT = "Bert LOAD REPORT from: x\n…"


def run(nan_row: int | None = None, **arguments: Any) -> None:
    """Train on points, one of which may have a loss that is not finite."""
    bad = torch.full((2,), float("nan"))
    rows = [(bad if n == nan_row else point, label) for n, (point, label) in enumerate(points(16))]
    defaults = {"n_epochs": 1, "validation_split": 0.25, "early_stopping_patience": 1, "restore_best_weights": True}
    test_fine_tuning(Layer(), train_data=rows, loss_fn=nn.CrossEntropyLoss(), **(defaults | arguments))


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> TrainArguments:
    """Return the names of an encoder without the head of a classifier, and of labelled text."""
    folder = tmp_path_factory.mktemp("named")
    BertForMaskedLM(HEADS["sequence classification, BERT"].model().config).float().save_pretrained(folder / "model")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]))
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder / "model")
    with (folder / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *[("good film", "yes"), ("bad", "no")] * 8])
    return TrainArguments(model=str(folder / "model"), train_data=str(folder / "rows.csv"))


# --- verbosity


def test_a_quiet_run_prints_only_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    run(6, verbosity="quiet")
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert "is skipped: its loss is nan" in line


def test_a_debugging_run_logs_measurements_cuts_audits_and_checkpoints(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(verbosity="debug", progress=False, output_dir=str(tmp_path))
    err = capsys.readouterr().err
    for message in (
        "Measured loss, relative difference between one batch and separate ones: 'loss' as a mean over labels: ",
        "Update 1: 4 rows; the main process's micro-batches have 4 rows (",
        "Audit of update 1: relative error ",
        "Wrote a checkpoint of ",
        "Restored the weights",
    ):
        assert message in err
    capsys.readouterr()
    run(progress=False)
    assert "Update 1: " not in capsys.readouterr().err


def test_verbosity_sets_the_level_of_the_logger_within_the_applications() -> None:
    found = {}
    for verbosity in ("quiet", "normal", "debug"):
        for own in (logging.NOTSET, logging.INFO, logging.ERROR):
            logger.setLevel(own)
            with run_logging(enabled=True, verbosity=verbosity):
                found[verbosity, own] = logger.level
            assert logger.level == own
    logger.setLevel(logging.NOTSET)
    assert [found["quiet", own] for own in (0, 20, 40)] == [30, 30, 40]
    assert [found["normal", own] for own in (0, 20, 40)] == [20, 20, 40]
    assert [found["debug", own] for own in (0, 20, 40)] == [10, 20, 40]


def test_a_quiet_search_prints_nothing_and_a_debugging_one_logs_its_trials(capsys: pytest.CaptureFixture[str]) -> None:
    quick(n_trials=1, n_epochs=1, progress=True, verbosity="quiet")
    assert capsys.readouterr() == ("", "")
    quick(n_trials=1, n_epochs=1, verbosity="debug")
    assert "Update 1: " in capsys.readouterr().err


def test_a_verification_shows_a_bar_on_a_terminal_unless_it_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for on_terminal, verbosity, is_shown in ((True, "normal", True), (True, "quiet", False), (False, "normal", False)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda on_terminal=on_terminal: on_terminal)
        verify(Layer(), points(8), loss_fn=nn.CrossEntropyLoss(), batch_size=2, n_splits=0, verbosity=verbosity)
        assert ("windows" in capsys.readouterr().err) == is_shown


# --- other libraries


def test_the_bars_of_other_libraries_are_hidden_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    def enabled() -> tuple[bool, ...]:
        return (
            not datasets.are_progress_bars_disabled(),
            transformers.utils.logging.is_progress_bar_enabled(),
            not hub.are_progress_bars_disabled(),
        )

    hub = importlib.import_module("huggingface_hub.utils.tqdm")
    before = enabled()
    try:
        for own in ((True, True, True), (False, True, False)):
            (datasets.enable_progress_bars if own[0] else datasets.disable_progress_bars)()
            transformers.utils.logging.enable_progress_bar()
            (hub.enable_progress_bars if own[2] else hub.disable_progress_bars)()
            for on_terminal, shown in ((True, True), (True, False), (False, True)):
                monkeypatch.setattr(sys.stderr, "isatty", lambda on_terminal=on_terminal: on_terminal)
                with library_bars(shown=shown):
                    assert enabled() == (own if on_terminal and shown else (False, False, False))
                assert enabled() == own
    finally:
        datasets.enable_progress_bars()
        transformers.utils.logging.enable_progress_bar()
    assert enabled() == before


@pytest.mark.parametrize("stream", [None, SimpleNamespace(write=print)])
def test_no_bars_are_drawn_without_a_standard_error(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    assert not ftaccum.runtime.progress_bar.can_draw_bars()


def test_a_file_gets_printed_lines_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "log.txt").open("w", buffering=1 << 16) as file:
        monkeypatch.setattr(sys, "stdout", file)
        ftaccum.runtime.progress_bar.print_above_bars("a line")
        assert (tmp_path / "log.txt").read_text() == "a line\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="it needs a file that is always full")
def test_a_run_goes_on_if_its_output_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", buffering=1 << 16) as full:
        monkeypatch.setattr(sys, "stdout", full)
        run()
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space left"):
            full.close()


def fail_to_load() -> None:
    MODELING.warning(REPORT)
    raise RuntimeError("see the report above")


def test_the_load_report_is_withheld_unless_loading_fails() -> None:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    MODELING.addHandler(handler)
    try:
        with load_report_withheld():
            MODELING.warning(REPORT)
            MODELING.warning("a warning")
        assert messages == ["a warning"]
        with pytest.raises(RuntimeError, match="above"), load_report_withheld():
            fail_to_load()
        assert messages == ["a warning", REPORT]
        MODELING.warning(REPORT)
        assert len(messages) == 3
    finally:
        MODELING.removeHandler(handler)


def test_new_weights_are_named_in_one_line(named: TrainArguments, capsys: pytest.CaptureFixture[str]) -> None:
    with loading(verbosity="normal", progress=False):
        load(named, {"random_seed": 0})
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("New weights, which the checkpoint does not have: bert.pooler.dense.bias, ")
    assert "classifier.weight (" in line
    with loading(verbosity="quiet", progress=True):
        load(named, {"random_seed": 0})
    assert capsys.readouterr() == ("", "")


def test_a_model_whose_body_is_new_is_a_warning(
    named: TrainArguments, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftaccum.tasks.new_weights._LARGEST_HEAD", 0.0)
    with loading(verbosity="quiet", progress=True):
        load(named, {"random_seed": 0})
    assert "Does the checkpoint belong to this kind of model?" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_print_no_line_of_another_library(
    named: TrainArguments, two_processes: Callable[..., str]
) -> None:
    options = ["--model", named.model, "--train_data", named.train_data, "--n_epochs", "1"]
    shown = two_processes("screen_of_two.py", *options, "--progress", "no").splitlines()
    assert shown[0].startswith(("New weights", "Classes:")) or shown[0] == "=" * 64
    assert not [line for line in shown if "Warning" in line or "REPORT" in line or "Loading" in line]
    assert sum(line.startswith("New weights") for line in shown) == 1
    assert two_processes("screen_of_two.py", *options, "--verbosity", "quiet") == ""


# --- notebooks


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Return tqdm's module for notebooks, as if this process was a notebook's."""
    ipython = ModuleType("IPython")
    # Older versions of tqdm look at the configuration, newer ones at the modules.
    ipython.get_ipython = lambda: SimpleNamespace(config={"IPKernelApp": {}})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", ModuleType("ipykernel.zmqshell"))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module("tqdm.notebook")
    for name in ("tqdm.auto", "tqdm.autonotebook"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield module
    monkeypatch.undo()
    importlib.reload(ftaccum.runtime.progress_bar)


def test_bars_are_widgets_in_a_notebook_and_text_without_a_warning_if_it_lacks_them(
    notebook: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notebook, "IProgress", None)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        importlib.reload(ftaccum.runtime.progress_bar)
    assert [str(each.message) for each in shown] == []
    assert not issubclass(ftaccum.runtime.progress_bar.tqdm, notebook.tqdm)
    for name in ("tqdm.auto", "tqdm.autonotebook"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(notebook, "IProgress", object)
    importlib.reload(ftaccum.runtime.progress_bar)
    assert issubclass(ftaccum.runtime.progress_bar.tqdm, notebook.tqdm)


# --- before a model is loaded

BAD = {
    "lr_scheduler": "linaer",
    "log_with": "no_such_tracker",
    "resume": "/no/such/folder",
    "n_epochs": 0,
}


def test_all_faults_are_found_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    faults = faults_before_loading(BAD | {"output_dir": tmp_path / "file" / "run"})
    for fault, words in zip(
        faults,
        [
            "`n_epochs` must be a positive integer",
            "`lr_scheduler` must be one of",
            "`log_with` is 'no_such_tracker'",
            "which cannot be created",
            "`resume` is '/no/such/folder', but there is no such folder",
        ],
        strict=True,
    ):
        assert words in fault
    assert faults_before_loading({"output_dir": str(tmp_path / "a" / "b")}) == []
    assert not (tmp_path / "a").exists()


def test_sizes_are_checked_for_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"batch_size": 4, "gradient_accumulation_steps": 2, "effective_batch_size": 8}
    assert faults_before_loading(sizes) == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    (fault,) = faults_before_loading(sizes)
    assert "4 rows × 2 steps × 2 processes = 16 rows" in fault


def test_an_existing_folder_is_not_removed_by_the_check(tmp_path: Path) -> None:
    RunDir(tmp_path).check()
    assert tmp_path.is_dir()


@pytest.mark.parametrize("command", ["train", "search"])
def test_commands_report_faults_before_anything_is_loaded(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("ftaccum.tasks.load.load_rows", fail)
    (tmp_path / "file").touch()
    words = ["--model", "x", "--train_data", "y.csv", "--output_dir", str(tmp_path / "file" / "run")]
    assert main([command, *words, "--lr_scheduler", "linaer", "--log_with", "no_such_tracker"]) == 2
    err = capsys.readouterr().err
    for words_of_fault in ("`lr_scheduler` must be one of", "which cannot be created", "`log_with` is"):
        assert words_of_fault in err


@pytest.mark.slow
def test_a_quiet_refit_prints_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    quick(n_trials=1, n_epochs=1, progress=True, verbosity="quiet", output_dir=str(tmp_path), refit=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_a_search_compares_its_study_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(n_trials=1, n_epochs=1, output_dir=str(tmp_path))
    monkeypatch.setattr("ftaccum.tasks.load.load_rows", lambda *_: pytest.fail("loaded"))
    words = ["--model", "x", "--train_data", "y.csv", "--output_dir", str(tmp_path)]
    assert main(["search", *words, "--n_epochs", "2"]) == 2
    assert "was created with `n_epochs` 1, and this search has 2" in capsys.readouterr().err


def test_a_missing_column_of_text_is_reported_before_the_model_is_loaded(
    named: TrainArguments, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "/absent", "--train_data", named.train_data, "--text_columns", "texts"]
    assert main(["train", *words]) == 2
    assert "has no column 'texts' to read texts from" in capsys.readouterr().err


def test_a_folder_that_a_search_cannot_create_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="which cannot be created"):
        search(Layer, train_data=points(), loss_fn=nn.CrossEntropyLoss(), output_dir=str(tmp_path / "file" / "s"))


def test_a_line_every_30_seconds_replaces_the_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 10_000, 8))  # 8 seconds pass between two readings
    monkeypatch.setattr("ftaccum.tracking.progress.time.monotonic", lambda: next(clock))
    progress = Progress(9, bar=True, lines=True)
    for n in range(9):
        progress.advance()
        progress.show(WindowEntry(n, 0, 8, 0.5, {}, 1.25, 2e-5, False, passes=1))
    lines = capsys.readouterr().out.splitlines()
    numbers = "loss 0.5000, norm 1.250, learning rate 2e-05"
    assert lines == [f"update {n}/9; update {n - 1} had {numbers}" for n in (4, 8)]
    silent = Progress(9, bar=False, lines=False)
    silent.show(WindowEntry(0, 0, 8, 0.5, {}, 1.25, 2e-5, False, passes=1))
    assert capsys.readouterr().out == ""
