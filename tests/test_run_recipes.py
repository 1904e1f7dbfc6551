"""`scripts/recipes`, with recipes that only write a result: thresholds, failures, the table and its place in a page."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import run_recipes
from process_tree import run_measured

RECIPE = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1], {folder!r})
settings = json.loads(pathlib.Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
print("the last words")
time.sleep(settings.get("seconds", 0.0))
if "status" in settings:
    sys.exit(settings["status"])
folder.mkdir(parents=True)
(folder / "result.json").write_text(json.dumps(settings))
(folder / "ledger.jsonl").write_text('{{"window": 0, "rows": 8}}\\n{{"audit": 1}}\\n{{"window": 1, "rows": 5}}\\n')
"""
RESULT = {
    "num_processes": 1, "initial_metrics": {"accuracy": 0.1}, "metrics": [{"accuracy": 0.5}, {"accuracy": 0.9}],
    "initial_loss": 2.0, "val_loss_history": [1.5, 1.25],
}  # fmt: skip
ENTRY = {"model": "a model", "data": "some data", "metric": "accuracy", "at_least": 0.8, "baseline": "chance 10%"}
ROW = "| `recipes/{}.py` | a model | some data | 13, 2 | 0 s | 0.0 GB | accuracy 0.1 → **0.9** (≥ 0.8) | chance 10% |"
PAGE = f"# Recipes\n\n{run_recipes.BEGIN}\n{run_recipes.END}\n\nThe end.\n"


class Folder:
    """A folder of recipes with their declarations, and a page for the table."""

    def __init__(self, path: Path) -> None:
        self.path, self.page, self._declared = path, path / "page.md", dict[str, Any]()
        self.page.write_text(PAGE)

    def add(self, name: str, changed: Any = (), folder: str = "", **entry: Any) -> None:
        (self.path / f"{name}.py").write_text(RECIPE.format(folder=folder))
        (self.path / f"{name}.yaml").write_text(json.dumps(RESULT | dict(changed)))
        self._declared[name] = {key: value for key, value in (ENTRY | entry).items() if value is not None}
        (self.path / "thresholds.yaml").write_text(yaml.safe_dump(self._declared))

    def run(self, *words: str) -> int:
        return run_recipes.main(words, self.path, [self.page])


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setattr(run_recipes, "describe_machine", lambda: "a machine")
    monkeypatch.setattr(run_recipes, "run_measured", lambda *given: _without_figures(*given))
    return Folder(tmp_path)


def _without_figures(words: Any, log: Path) -> Any:
    return type(found := run_measured(words, log))(found.status, 0.0, 0)


def test_a_table_has_what_was_declared_and_what_was_reached(
    recipes: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes.add("one")
    recipes.add("a_search", folder="best", metric="val_loss", at_least=None, at_most=1.25)
    assert recipes.run() == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[2:] == [
        ROW.format("a_search").replace("accuracy 0.1 → **0.9** (≥ 0.8)", "val_loss 2 → **1.25** (≤ 1.25)"),
        ROW.format("one"),
        "",
        "a machine",
    ]
    assert shown.err == "a_search …\none …\n"


@pytest.mark.parametrize(
    ("changed", "entry", "expected"),
    [
        ({"metrics": [{"accuracy": 0.79}]}, {}, "`recipes/bad.py` misses its threshold: accuracy is 0.79"),
        ({"val_loss_history": [1.0, 1.3]}, {"metric": "val_loss", "at_least": None, "at_most": 1.2}, "must be ≤ 1.2."),
        ({"status": 3}, {}, "ended with status 3:\nthe last words"),
        ({}, {"metric": "f1"}, "bad.py: result.json has no metric 'f1'."),
        ({"num_processes": 2}, {}, "bad.py ran on 2 processes, not on 1."),
        ({"metrics": [{"accuracy": None}]}, {}, "accuracy is nan, but must be ≥ 0.8."),
        ({"metrics": []}, {}, "bad.py: result.json has no metric 'accuracy'."),
    ],
)  # fmt: skip
def test_a_failure_is_named_and_does_not_stop_the_others(
    recipes: Folder, changed: dict[str, Any], entry: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes.add("bad", changed, **entry)
    recipes.add("good")
    file = recipes.path / "figures.json"
    assert recipes.run("--json", str(file)) == 1
    shown = capsys.readouterr()
    assert expected in shown.err
    assert ROW.format("good") in shown.out
    assert expected in json.loads(file.read_text())["failures"][0]


def test_a_recipe_without_a_result_is_a_failure(recipes: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    recipes.add("one", folder="elsewhere")
    assert recipes.run() == 1
    assert "wrote no result.json:\nthe last words" in capsys.readouterr().err


def test_raw_figures_are_saved(recipes: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes.add("one", {"seconds": 0.5})  # the memory of a process that ends sooner may not be seen
    monkeypatch.setattr(run_recipes, "run_measured", run_measured)
    assert recipes.run("--json", str(recipes.path / "figures.json")) == 0
    (run,) = json.loads((recipes.path / "figures.json").read_text())["runs"]
    assert (run["recipe"], run["processes"], run["rows"], run["updates"]) == ("one", 1, 13, 2)
    assert (run["metric"], run["before"], run["after"]) == ("accuracy", 0.1, 0.9)
    assert run["seconds"] > 0
    assert run["peak_memory"] > 1e6


def test_a_slow_recipe_only_gets_a_warning(
    recipes: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes.add("one")
    monkeypatch.setattr(run_recipes, "LONGEST", -1.0)
    assert recipes.run() == 0
    assert "Warning: `recipes/one.py` took 0 s" in capsys.readouterr().err


def test_the_table_of_a_page_is_replaced(recipes: Folder) -> None:
    recipes.add("old")
    assert recipes.run("--write") == 0
    (recipes.path / "old.py").unlink()
    recipes.add("one")
    recipes.add("two")
    assert recipes.run("--write") == 0
    assert recipes.run("--write", "two", "one", "two") == 0
    recipes.add("two", {"metrics": [{"accuracy": 0.85}]})
    assert recipes.run("--write", "two") == 0
    before, begin, rest = recipes.page.read_text().partition(run_recipes.BEGIN)
    table, end, after = rest.partition(run_recipes.END)
    assert (before, begin, end, after) == ("# Recipes\n\n", run_recipes.BEGIN, run_recipes.END, "\n\nThe end.\n")
    assert table.strip().splitlines()[2:] == [
        ROW.format("one"),
        ROW.format("two").replace("0.9", "0.85"),
        "",
        "a machine",
    ]


def test_figures_of_two_machines_are_not_mixed(
    recipes: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes.add("one")
    recipes.add("two")
    assert recipes.run("--write") == 0
    monkeypatch.setattr(run_recipes, "describe_machine", lambda: "another machine")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="figures of another machine"):
        recipes.run("--write", "two")
    assert capsys.readouterr().err == ""  # nothing ran
    assert recipes.run("--write") == 0
    assert "\nanother machine\n" in recipes.page.read_text()


def test_bad_input_ends_before_anything_runs(recipes: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    recipes.add("one")
    with pytest.raises(SystemExit, match=r"There is no recipe 'tow'. The recipes are one."):
        recipes.run("tow")
    (recipes.path / "two.py").touch()
    with pytest.raises(SystemExit, match=r"thresholds.yaml has no entry for two."):
        recipes.run()
    recipes.page.write_text("no place\n")
    with pytest.raises(SystemExit, match="needs the lines"):
        recipes.run("one", "--write")
    for entry in ({"at_least": None}, {"at_most": 1.0}, {"mertic": "accuracy"}, {"metric": None}):
        recipes.add("two", **entry)
        with pytest.raises(SystemExit, match="the entry 'two' cannot be read: "):
            recipes.run("one")
    assert capsys.readouterr().err == ""


def test_two_processes_are_launched_with_the_configuration_of_the_recipes() -> None:
    recipe = run_recipes.RECIPES / "search.py"
    words = run_recipes.command(recipe, Path("out"), 2)
    config = Path(words[words.index("--config_file") + 1])
    assert yaml.safe_load(config.read_text())["num_processes"] == 2
    assert words.index("accelerate.commands.launch") < words.index(str(recipe))
    settings = ["--config", str(recipe.with_suffix(".yaml"))]
    assert words[-7:] == [str(recipe), *settings, "--output_dir", "out", "--progress", "no"]


def test_a_row_for_two_processes_does_not_repeat_what_is_declared() -> None:
    figures = run_recipes.Figures("one", 2, 61.4, 2_460_000_000, 1200, 75, "accuracy", None, 0.8456)
    cells = figures.cells(run_recipes.Declared(**ENTRY))
    result = "accuracy – → **0.846** (≥ 0.8)"
    assert cells == ["`recipes/one.py`, 2 processes", "", "", "1,200, 75", "61 s", "2.5 GB", result, ""]


def test_the_packaged_files_that_a_recipe_names_are_prepared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text('"""Not packaged.SMOLLM."""\npackaged.prepare()  # nor packaged.MINILM\n')
    run_recipes.prepare(recipe)
    import packaged

    prepared: list[Any] = []
    monkeypatch.setattr(packaged, "prepare", lambda *names: prepared.extend(names))
    run_recipes.prepare(run_recipes.RECIPES / "text_classification.py")
    assert prepared == [packaged.MINILM, packaged.MOVIES_TRAIN, packaged.MOVIES_VAL]

    prepared.clear()
    run_recipes.prepare(recipe)
    assert prepared == []


def test_memory_is_the_peak_of_all_processes_together(tmp_path: Path) -> None:
    held = "import subprocess, sys, time; b = bytearray({}); b[::4096] = b'x' * len(b[::4096]); del b; {}"
    child = held.format(100_000_000, "time.sleep(0.8)")
    parent = held.format(70_000_000, f"sys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode + 7)")
    usage = run_measured([sys.executable, "-c", parent], tmp_path / "log")
    assert usage.status == 7
    assert usage.seconds > 0.8
    assert 170e6 < usage.peak_memory < 260e6


def test_an_interrupt_ends_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    import process_tree

    trees: list[list[psutil.Process]] = []

    def interrupted(process: psutil.Process) -> int:
        if tree := psutil.Process(process.pid).children():
            trees.append([process, *tree])
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(process_tree, "_high_water_mark", interrupted)
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    with pytest.raises(KeyboardInterrupt):
        run_measured([sys.executable, "-c", script], tmp_path / "log")
    assert not any(process.is_running() for process in trees[0])
