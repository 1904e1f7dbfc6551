"""Runs whose ledger is damaged or of a newer version, or whose result file is lost."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ftaccum import DataError, Result
from ftaccum.apps.cli import main
from ftaccum.apps.report import read_runs
from ftaccum.errors import OutputWarning
from ftaccum.insight.curves import Measured, RunCurves
from ftaccum.insight.figures import figure_of
from ftaccum.insight.run_report import report_page
from ftaccum.planning.batch_size import BatchSizes
from ftaccum.tracking.ledger import AuditEntry, EpochEntry, EvaluationEntry, Ledger, WindowEntry
from ftaccum.tracking.ledger_file import LedgerFile, read_entry
from run_records import new_record

TIMES = {"data_seconds": 0.25, "pass_seconds": 1.5, "optimizer_seconds": 0.25}
N_UPDATES = 5


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run of five updates. Line n + 1 of its ledger has update n."""
    folder = tmp_path / "run"
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.record(EvaluationEntry(0, 0, 0, math.nan, 3.0, {"f1": 0.25}))
    for n in range(N_UPDATES):
        ledger.record(WindowEntry(n, 0, 8, 2.0 - n / 4, {}, math.inf, 0.01, False, 2, tokens=30, positions=40, **TIMES))
    ledger.record(AuditEntry(5, 0, 8, "one batch", 2e-7, 1e-8, 1e-6, 3.0))
    ledger.record(EpochEntry(0, 1.5))
    record = new_record(BatchSizes(4, 2, 1, 8), recipe={"learning_rate": 0.01}, environment={"torch": "2.13.0"})
    assert record.write(folder / "run.json")
    result = replace(Result.load(folder), interrupted=False)
    assert replace(record, finished=True).write(folder / "run.json")
    result.save(folder / "result.json")
    return folder


def damage(run: Path, line: int, text: str) -> None:
    lines = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    (run / "ledger.jsonl").write_text("".join([*lines[: line - 1], text, *lines[line:]]))


def unfinish(run: Path) -> None:
    """Make a run one that was interrupted."""
    (run / "result.json").unlink()
    (run / "run.json").write_text((run / "run.json").read_text().replace('"finished": true', '"finished": false'))


def test_a_lost_result_is_built_from_the_ledger(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = Result.load(run)
    (run / "result.json").unlink()
    built = Result.load(run)
    assert not built.interrupted
    np.testing.assert_equal(
        {**built, "training_time": 0, "output_dir": ""}, {**saved, "training_time": 0, "output_dir": ""}
    )
    for command in ("advise", "report"):
        assert main([command, str(run)]) == 0
    damage(run, 3, "null\n")
    for command in ("advise", "report"):
        assert main([command, str(run)]) == 2
        assert "has no `result.json`, and the ledger is damaged at line 3. Restore" in capsys.readouterr().err
    (run / "run.json").write_text("{}")
    with pytest.raises(DataError, match=r"`run.json` is not a complete record. Restore"):
        Result.load(run)


WINDOW = {"window": 2, "epoch": 0, "rows": 8, "loss": 1.5, "terms": {}, "grad_norm": None, "learning_rate": 0.01,
          "skipped": False, "passes": 2}  # fmt: skip
DAMAGED = {
    "list": "[1, 2]", "null": "null", "empty": "{}", "deep": "[" * 100_000, "bytes": "\udcff",
    "text": json.dumps({**WINDOW, "loss": "abc"}), "object": json.dumps({**WINDOW, "rows": {}}),
    "number": json.dumps({**WINDOW, "skipped": 0}), "term": json.dumps({**WINDOW, "terms": {"a": "b"}}),
    "terms": json.dumps({**WINDOW, "terms": [1]}), "count": json.dumps({**WINDOW, "rows": None}),
    "lacking": '{"window": 2, "epoch": 0}', "repeated": json.dumps({**WINDOW, "window": 1}),
    "skipping": json.dumps({**WINDOW, "window": 3}), "half": json.dumps(WINDOW)[:30],
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_ledger_is_read_up_to_the_damaged_line(kind: str, run: Path) -> None:
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    bad = DAMAGED[kind].encode(errors="surrogateescape")
    (run / "ledger.jsonl").write_bytes(b"".join([*lines[:3], bad, b"\n", *lines[4:]]))
    found = LedgerFile.read(run / "ledger.jsonl")
    assert (len(found.ledger.windows), found.damaged_line, found.ends_there) == (2, 4, False)
    if kind not in ("repeated", "skipping"):
        with pytest.raises(ValueError, match=r"\S"):
            read_entry(bad)


def test_a_damaged_ledger_leaves_the_settings_and_versions(run: Path) -> None:
    damage(run, 4, "[1, 2]\n")
    (curves,) = read_runs([str(run)])
    assert curves.gaps["speed"] == "the ledger is damaged at line 4"
    assert (curves.settings["learning_rate"], curves.environment["torch"]) == (0.01, "2.13.0")
    assert (len(curves.loss), len(curves.rows)) == (N_UPDATES, 0)
    (run / "ledger.jsonl").write_text("".join((run / "ledger.jsonl").read_text().splitlines(keepends=True)[:3]))
    (curves,) = read_runs([str(run)])
    assert curves.gaps["speed"] == "`ledger.jsonl` ends after update 2"
    damage(run, 1, "null\n")
    (curves,) = read_runs([str(run)])
    assert (curves.gaps["speed"], curves.settings["learning_rate"]) == ("the ledger is damaged at line 1", 0.01)


def test_names_and_kinds_of_a_newer_version_are_left_out(run: Path) -> None:
    (known,) = read_runs([str(run)])
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    newer = [{**entry, "future": [1]} for entry in lines]
    newer.insert(3, {"merge": 2, "epoch": 0})
    (run / "ledger.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in newer))
    assert LedgerFile.read(run / "ledger.jsonl").damage == ""
    (curves,) = read_runs([str(run)])
    assert (curves.rows, curves.speed, curves.outcome) == (known.rows, known.speed, known.outcome)
    with pytest.raises(ValueError, match="future"):  # a checkpoint must be complete
        read_entry(json.dumps(newer[0]))


def test_only_a_damaged_last_line_of_an_interrupted_run_is_silent(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinish(run)
    with (run / "ledger.jsonl").open("a") as file:
        file.write('{"window": 5, "ep')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Result.load(run).loss_history) == N_UPDATES
        (curves,) = read_runs([str(run)])
    assert curves.outcome["note"] == ""
    damage(run, 4, "null\n")
    for command in ("advise", "report"):
        with pytest.warns(
            OutputWarning, match="the ledger is damaged at line 4. The result ends there, after update 2"
        ):
            assert main([command, str(run)]) == 0
    assert "the ledger is damaged at line 4" in (run / "report.html").read_text()
    damage(run, 1, "null\n")
    assert main(["report", str(run)]) == 2
    assert "the ledger is damaged at line 1. Restore" in capsys.readouterr().err


def test_the_figures_of_an_interrupted_run_come_from_its_ledger(run: Path) -> None:
    unfinish(run)
    (curves,) = read_runs([str(run)])
    known = {
        name: curves.outcome[name] for name in ("padding", "rows per second", "tokens per second", "time of updates")
    }
    assert known == {
        "padding": "25.0%", "rows per second": "4", "tokens per second": "15", "time of updates": "13 s",
    }  # fmt: skip
    assert "4.0 rows/s" in str(Result.load(run))
    damage(run, N_UPDATES + 3, "")  # the epoch, which has the training loss
    (curves,) = read_runs([str(run)])
    assert (curves.outcome["final training loss"], curves.outcome["first training loss"]) == ("", "3.0000")
    assert "final training loss" not in report_page([curves])


def test_results_are_in_one_order_for_any_order_of_runs() -> None:
    one = RunCurves("1", [1.0], [1.0], [0.1], outcome={"state": "a", "f1": "b", "unknown": "", "updates": "c"})
    two = RunCurves("2", [1.0], [1.0], [0.1], outcome={"state": "a", "accuracy": "b", "unknown": "", "updates": "c"})
    for runs in ([one, two], [two, one]):
        page = report_page(runs)
        places = [page.index(f'class="name">{name}<') for name in ("state", "accuracy", "f1", "updates")]
        assert places == sorted(places)
        assert "unknown" not in page


def test_names_that_the_font_lacks_give_no_warning() -> None:
    run = RunCurves("中文", [1.0, 2.0], [1.0, 2.0], [0.1, 0.1], evaluations={"中" * 300: Measured([1, 2], [0.5, 0.75])})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page, figure = report_page([run, replace(run, name="文")]), figure_of(run)
        figure._repr_png_()
    assert "中文" in page
    assert max(len(axes.get_title()) for axes in figure.axes) == 48
