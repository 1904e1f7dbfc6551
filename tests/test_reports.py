"""Reports and plots of runs: `ftaccum report`, `Result.report` and `Result.plot`."""

import html
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from ftaccum import Result, SettingsError, test_fine_tuning
from ftaccum.apps.cli import main
from ftaccum.apps.report import read_runs
from ftaccum.insight.curves import Measured, NoiseScaleCurve, RunCurves, smooth, thin
from ftaccum.insight.figures import figure_of, panel_figure, panels_of
from ftaccum.insight.run_report import report_page
from ftaccum.insight.style import COLORS, RUN_COLORS
from ftaccum.runtime.run_dir import RunDir
from ftaccum.tasks.arguments import TrainArguments
from ftaccum.tracking.ledger import AuditEntry, EpochEntry, EvaluationEntry, Ledger, WindowEntry
from ftaccum.tracking.run_curves import SOURCE_DEFAULTS
from heads import HEADS

RECORD: dict[str, Any] = {
    "recipe": {"learning_rate": 0.01, "gradient_clip_norm": 0.75, "random_seed": 42},
    "tokens_per_update": None, "batch_size": 4, "gradient_accumulation_steps": 2, "effective_batch_size": 8,
    "accumulation_schedule": None, "num_processes": 1, "amp_enabled": False, "keep_checkpoints": 2,
    "sources": {"model": "tiny"}, "started_at": "2026-11-28T10:00:00+00:00",
}  # fmt: skip
ROWS = [8, 8, 5]  # of the updates in an epoch, with a remainder
TIMES = {"data_seconds": 0.25, "pass_seconds": 1.5, "optimizer_seconds": 0.25}


def write_run(
    folder: Path, n: int = 6, *, finished: bool = True, old: bool = False, recipe: dict[str, Any] | None = None
) -> Path:
    """Write the folder of a run of n updates, as an old version did or with all that is recorded."""
    folder.mkdir(parents=True)
    ledger, total = Ledger(folder / "ledger.jsonl"), 0
    ledger.record(EvaluationEntry(0, 0, 0, math.nan, 3.0, {"f1": 0.25}))
    for update in range(1, n + 1):
        rows = ROWS[(update - 1) % 3]
        total += rows
        new = {} if old else {"tokens": 30, "positions": 40, "clip_coefficient": 0.5, "peak_memory": 2**30, **TIMES}
        norm = 1.0 + update / 10
        ledger.record(WindowEntry(update - 1, 0, rows, 2.0 / update, {}, norm, 0.01 / update, False, 2, **new))
        if update % 2 == 0:
            ledger.record(EvaluationEntry(update, 0, total, 1.0, 2.5 / update, {"f1": update / 100}))
    if not old:
        ledger.record(AuditEntry(n, 0, 8, "one batch", 2e-7, 1e-8, 1e-6, 3.0))
    ledger.record(EpochEntry(0, 1.5))
    recorded = {**RECORD, "recipe": {**RECORD["recipe"], **(recipe or {})}, "finished": False}
    recorded |= {} if old else {"environment": {"torch": "2.13.0", "device": "cpu"}}
    (folder / "run.json").write_text(json.dumps(recorded))
    if finished:
        known = {"training_time": 12.0, "samples_per_second": 3.5, "tokens_per_second": 15.0, "padding_fraction": 0.25}
        replace(Result.load(folder), interrupted=False, **known).save(folder / "result.json")
        (folder / "run.json").write_text(json.dumps({**recorded, "finished": True}))
    return folder


class Page(HTMLParser):
    """A page whose tags are balanced, with the cells of its tables and its figures."""

    VOID = ("meta", "input", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.ids: list[str] = []
        self.feed(text)
        assert self.open == []
        assert len(set(self.ids)) == len(self.ids)
        assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', text)) <= set(self.ids)
        self.text = text
        self.figures = {
            html.unescape(title): ElementTree.fromstring(svg)
            for title, svg in re.findall("<figcaption>(.*?)</figcaption>(<svg.*?</svg>)", text, re.DOTALL)
        }

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, _tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def rows(self, table: int = 0) -> dict[str, list[str]]:
        return {row[0]: row[1:] for row in self.tables[table]}


def lines(figure: Any) -> dict[str, list[Any]]:
    """Return the points of the lines in each panel of a figure."""
    return {axes.get_title(): [line.get_xydata() for line in axes.get_lines()] for axes in figure.axes}


def test_a_report_compares_runs_and_needs_no_other_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two & <b>", 4, finished=False, old=True, recipe={"learning_rate": 0.5})
    file = tmp_path / "page.html"
    assert main(["report", str(one), "--output", str(file), "--axis", "updates", str(two)]) == 0
    assert capsys.readouterr().out == f"Wrote {file}.\n"
    page = Page(file.read_text())
    assert not re.findall(r'https?:|(?:src|href)="(?!#)|@import|url\((?!#)', page.text)
    assert 'id="by-updates" checked' in page.text
    results = page.rows()
    assert page.tables[0][0] == ["", "one", "two & <b>"]
    assert results["state"] == ["finished", "interrupted after update 4"]
    assert results["final validation loss"] == ["0.4167", "0.6250"]  # 2.5 / 6 and 2.5 / 4
    assert results["final f1"] == ["0.0600", "0.0400"]
    assert results["rows trained on"] == ["42", "29"]
    assert results["peak memory"] == ["1.07 GB", "–"]
    assert results["clipped updates"] == ["100%", "–"]
    assert results["audits"] == ["1 of 1 exact, largest error 2e-07", "–"]
    assert results["time of updates"] == ["15 s", "–"]  # six times two seconds, and an audit
    assert results["run of"] == ["tiny, 2026-11-28"] * 2
    assert page.tables[1] == [["different", "one", "two & <b>"], ["learning_rate", "0.01", "0.5"]]
    assert page.rows(3)["random_seed"] == ["42"]
    assert page.tables[4][1] == ["torch", "2.13.0", "–"]
    assert list(page.figures) == [
        "Training loss", "Validation loss", "f1", "Gradient norm before clipping", "Learning rate", "Padding",
        "Throughput", "Time of updates",
    ]  # fmt: skip
    assert "Not shown: Gradient noise scale, with its 90% interval. Reason: it was not measured." in page.text
    assert "Not shown for two &amp; &lt;b&gt;: Padding, Throughput, Time of updates. Reason: " in page.text


def test_plot_shows_the_numbers_of_the_ledger(tmp_path: Path) -> None:
    shown = Result.load(write_run(tmp_path / "run")).plot()
    rows, found = np.cumsum(ROWS * 2), lines(shown)
    np.testing.assert_array_equal(found["Training loss"][0], np.stack([rows, 2 / np.arange(1, 7)], 1))
    np.testing.assert_array_equal(found["Validation loss"][0].T, [[0, 16, 29, 42], [3, 1.25, 2.5 / 4, 2.5 / 6]])
    np.testing.assert_array_equal(found["f1"][0].T, [[0, 16, 29, 42], [0.25, 0.02, 0.04, 0.06]])
    norms, clipping = found["Gradient norm before clipping"]
    np.testing.assert_array_equal(norms[:, 1], 1 + np.arange(1, 7) / 10)
    np.testing.assert_array_equal(clipping[:, 1], 0.75)
    np.testing.assert_array_equal(found["Learning rate"][0][:, 1], 0.01 / np.arange(1, 7))
    np.testing.assert_array_equal(found["Padding"][0][:, 1], 0.25)
    np.testing.assert_array_equal(found["Throughput"][0][:, 1], 30 / 2)
    bars = {bar.get_label(): bar.patches[0].get_width() for bar in shown.axes[-1].containers}
    assert bars == pytest.approx({"data": 0.1, "forward and backward": 0.6, "optimizer": 0.1, "audits": 0.2})
    assert shown._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]  # IPython shows it in a notebook


def test_a_result_in_memory_has_the_curves_of_its_histories(tmp_path: Path) -> None:
    result = replace(Result.load(write_run(tmp_path / "run")), output_dir=None)
    found = lines(result.plot())
    assert list(found) == [
        "Training loss", "Validation loss", "f1", "Gradient norm before clipping", "Learning rate",
    ]  # fmt: skip
    np.testing.assert_array_equal(found["Training loss"][0][:, 0], np.arange(1, 7))  # the rows are not known
    np.testing.assert_array_equal(found["Validation loss"][0].T, [[0, 2, 4, 6], [3, 1.25, 2.5 / 4, 2.5 / 6]])
    np.testing.assert_array_equal(found["f1"][0].T, [[0, 2, 4, 6], [0.25, 0.02, 0.04, 0.06]])
    with pytest.raises(SettingsError, match="`path` is None, but the run had no `output_dir`"):
        result.report()
    assert "0.4167" in result.report(tmp_path / "page.html").read_text()
    assert replace(result, output_dir=str(tmp_path / "new")).report() == tmp_path / "new" / "report.html"
    assert (tmp_path / "new" / "report.html").exists()


def test_a_run_without_a_folder_is_reported_from_memory(tmp_path: Path) -> None:
    head = HEADS["sequence classification, BERT"]
    data: dict[str, Any] = {"train_data": head.rows(8), "val_data": head.rows(3)}
    result = test_fine_tuning(head.model().float(), **data, n_epochs=1, batch_size=2, audit=False, verbosity="quiet")
    found = lines(result.plot())
    assert {"Validation loss", "Throughput", "Time of updates"} <= found.keys()
    assert len(found["Gradient norm before clipping"]) == 2  # the norms and the limit
    page = Page(result.report(tmp_path / "page.html").read_text())
    assert "<h1>Fine-tuning run</h1>" in page.text
    assert "8 training rows" in page.text
    assert "torch" in page.rows(3)


def test_a_folder_that_has_another_run_by_now_is_not_read(tmp_path: Path) -> None:
    result = Result.load(write_run(tmp_path / "run"))
    earlier = replace(result, loss_history=[9.0], grad_norm_history=[1.0], lr_history=[0.1])
    np.testing.assert_array_equal(lines(earlier.plot())["Training loss"][0], [[1, 9]])


def test_a_run_that_is_still_running_can_be_reported(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2, finished=False)
    with (run / "ledger.jsonl").open("a") as file:
        file.write('{"window": 2, "epo')  # a line that is being written
    with RunDir(run).lock():
        (curves,) = read_runs([str(run)])
    assert curves.outcome["state"] == "running, after update 2"
    assert list(curves.loss) == [2.0, 1.0]


def test_the_noise_scale_has_its_interval_and_the_rows_of_an_update() -> None:
    noise = NoiseScaleCurve([2, 4], [50.0, math.nan], [40.0, 30.0], [70.0, math.nan])  # the last one has no upper limit
    run = RunCurves("$run", [1.0] * 4, [1.0] * 4, [0.1] * 4, [8, 16, 24, 32], [8] * 4, noise_scale=noise)
    panel = next(panel for panel in panels_of([run]) if panel.title.startswith("Gradient noise"))
    axes = panel_figure(panel, [run], "rows").axes[0]
    scale, update = (line.get_xydata() for line in axes.get_lines())
    np.testing.assert_array_equal(scale, [[16, 50], [32, math.nan]])
    np.testing.assert_array_equal(update[:, 1], 8)
    corners = {tuple(point) for point in axes.collections[0].get_paths()[0].vertices.tolist()}
    assert corners == {(16, 40), (16, 70), (32, 30), (32, 2 * 70)}  # up to the edge


def test_runs_of_one_color_have_other_dashes_in_curves_and_in_the_legend() -> None:
    runs = [RunCurves(f"run {n}", [1.0, 2.0], [1.0, 2.0], [0.1, 0.1]) for n in range(18)]
    page = Page(report_page(runs))
    found = re.findall(r'stroke="var\(--(c\d)\)" stroke-width="3"(?: stroke-dasharray="([\d. ]+)")?', page.text)
    assert len(set(found)) == len(runs) == len(found)
    drawn = panel_figure(panels_of(runs)[0], runs, "updates").axes[0].get_lines()
    for line, (color, dashes) in zip(drawn, found, strict=True):
        assert str(line.get_color()).lower() == color
        _, pattern = line._dash_pattern  # type: ignore[attr-defined]
        expected = [float(length) / 3 * line.get_linewidth() for length in dashes.split()]
        assert (pattern or []) == pytest.approx(expected)


def test_curves_are_thinned_without_losing_their_extremes() -> None:
    x = np.arange(100_000)
    y = np.sin(x / 5_000)
    y[[777, 50_123]], y[3] = (-7, 9), np.nan
    few_x, few_y = thin(x, y, 1000)
    assert len(few_x) <= 1002
    assert [few_x[0], few_x[-1]] == [0, 99_999]
    assert [few_x[np.nanargmin(few_y)], few_x[np.nanargmax(few_y)]] == [777, 50_123]
    np.testing.assert_array_equal(few_y, y[few_x])
    np.testing.assert_array_equal(thin(x[:10], y[:10], 10), [x[:10], y[:10]])
    np.testing.assert_array_equal(smooth(np.array([1.0, np.nan, 4.0, 7.0]), 3), [1, 2.5, 5.5, 5.5])


def test_the_page_of_a_long_run_is_small() -> None:
    values = np.random.default_rng(0).random(100_000)
    run = RunCurves("long", values, values, values, evaluations={"validation loss": Measured([1], [1.0])})
    assert len(report_page([run])) < 400_000


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "RUN is required: the output folders of runs"),
        (["--axes", "rows", "run"], "There is no option '--axes'"),
        (["missing"], "There is no folder 'missing'. Give the output folder of a run."),
        (["empty"], "'empty' has no `result.json` and no `run.json`, so it is not the output folder of a run."),
        (["search"], "It is that of a search, which has written its own `report.html`."),
        (["begun"], "The run in 'begun' has not completed an update yet"),
        (["unknown"], "'unknown' has no `result.json` and no `run.json`"),
        (["run", "--output", "no/page.html"], "`--output` 'no/page.html' is in a folder that does not exist."),
        (["run", "--axis", "time"], "`axis` must be 'rows' or 'updates' or None, but is 'time' instead."),
        (["result", "--axis", "rows"], "`--axis` is 'rows', but there is no ledger of 'result'"),
    ],
)
def test_bad_input_gets_one_error(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"))
    for name in ("empty", "search/trials", "begun", "unknown", "result"):
        Path(name).mkdir(parents=True)
    Path("unknown/ledger.jsonl").write_text(Path("run/ledger.jsonl").read_text())
    Path("result/result.json").write_text(Path("run/result.json").read_text())
    Path("begun/run.json").write_text(json.dumps({**RECORD, "finished": False}))
    Path("begun/ledger.jsonl").touch()
    assert main(["report", *words]) == 2
    shown = capsys.readouterr()
    assert f"ftaccum report: {sentence}" in shown.err or sentence in shown.err
    assert shown.out == ""


def test_runs_of_one_name_are_distinguished_by_their_folders(tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / name / "run", 2)) for name in "ab"]
    assert [run.name for run in read_runs([*runs, runs[0]])] == ["a/run", "b/run", "a/run (2)"]


def test_without_matplotlib_one_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = Result.load(write_run(tmp_path / "run"))
    for name in ("matplotlib.style", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "ftaccum.insight.notebook_figure", raising=False)
    for use in (result.report, result.plot):
        with pytest.raises(SettingsError, match=r"matplotlib.*Run `pip install ftaccum\[plots\]`"):
            use()


def test_a_plot_leaves_the_style_of_the_user() -> None:
    import matplotlib

    run = RunCurves("run", [1.0, 2.0], [1.0, 2.0], [0.1, 0.1])
    with matplotlib.rc_context({"lines.linestyle": "--", "text.color": "red"}):
        before = dict(matplotlib.rcParams)
        report_page([run])
        assert dict(matplotlib.rcParams) == before
        assert figure_of(run).axes[0].title.get_color() == "red"


def test_runs_of_different_scale_share_a_logarithmic_axis() -> None:
    fast, slow = (
        RunCurves(
            name, [1.0] * 4, [1.0] * 4, [0.0, rate, rate, rate], [4, 8, 12, 16], speed=[speed] * 4, speed_unit="rows"
        )
        for name, rate, speed in (("fast", 1e-2, 9e3), ("slow", 1e-5, 5.0))
    )
    for runs, kind in (([fast, slow], "log"), ([fast], "linear")):
        panels = {panel.title: panel for panel in panels_of(runs)}
        drawn = [panel_figure(panels[title], runs, "updates").axes[0] for title in ("Learning rate", "Throughput")]
        assert [axes.get_yscale() for axes in drawn] == [kind, kind]


def test_settings_that_are_not_at_their_defaults_come_first(tmp_path: Path) -> None:
    recipe = {"learning_rate": 0.5, "gradient_clip_norm": None, "n_epochs": 3, "adam_beta1": None}
    (run,) = read_runs([str(write_run(tmp_path / "run", recipe=recipe))])
    page = Page(report_page([run]))
    assert list(page.rows(1)) == [
        "model", "batch_size", "gradient_accumulation_steps", "effective_batch_size", "num_processes",
        "learning_rate", "gradient_clip_norm",
    ]  # fmt: skip
    assert page.rows(2)["n_epochs"] == ["3"]
    assert "adam_beta1" not in page.rows(2)


def test_a_report_says_why_figures_are_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", old=True)
    result = Result.load(run)
    result.report()
    assert "Time of updates. Reason: an older version wrote the ledger" in (run / "report.html").read_text()
    whole = (run / "ledger.jsonl").read_text()
    (run / "ledger.jsonl").write_text(whole[: len(whole) // 2])
    result.report()
    assert "Reason: the ledger is damaged at line " in (run / "report.html").read_text()
    (run / "ledger.jsonl").unlink()
    result.report()
    assert "Reason: the folder of the run has no `ledger.jsonl`." in (run / "report.html").read_text()


@pytest.mark.parametrize("theme", [0, 1])
def test_colors_of_curves_and_bars_differ_from_the_page(theme: int) -> None:
    def luminance(color: str) -> float:
        shares = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    page = luminance(COLORS["page"][theme])
    for color in RUN_COLORS:
        low, high = sorted((page, luminance(color[theme])))
        assert (high + 0.05) / (low + 0.05) >= 3


def test_the_defaults_of_the_command_line_are_known() -> None:
    values = {f.name: f.default for f in fields(TrainArguments) if f.name not in ("model", "train_data", "task")}
    assert {name: value for name, value in values.items() if value} == SOURCE_DEFAULTS
