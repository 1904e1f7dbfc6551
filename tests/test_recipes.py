"""All recipes: their files, a test of each, and runs on two processes; and the recipes that need no file of their own.

Each recipe has a test that trains a tiny model, and a function `NAME_words(folder)` that returns the options of that
model and its rows. Both are here or in a file `test_recipes_….py`.
"""

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import pipeline

import ftaccum
from ftaccum import Result
from recipe_runs import RECIPES, run_recipe
from task_files import save_encoder

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from run_recipes import read_declared

NAMES = sorted(file.stem for file in RECIPES.glob("*.py"))
MODULES = sorted(file.stem for file in Path(__file__).parent.glob("test_recipes*.py"))

recipe = pytest.mark.parametrize("name", NAMES)


def function_of(name: str) -> Callable[..., Any]:
    """Return a function of this name in one of the files of tests."""
    found = [getattr(module, name, None) for module in map(importlib.import_module, MODULES)]
    return next(function for function in found if function is not None)


@recipe
def test_a_recipe_has_a_settings_file_whose_settings_are_known(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_recipe(name, "--config", str(RECIPES / f"{name}.yaml"), "--help-all") == 0
    assert "--learning_rate" in capsys.readouterr().out


def test_every_recipe_has_a_threshold_and_a_test() -> None:
    assert sorted(read_declared(RECIPES / "thresholds.yaml")) == NAMES
    for name in NAMES:
        function_of(f"{name}_words")
        function_of(f"test_{name}")


@recipe
def test_a_recipe_uses_the_public_api_only(name: str) -> None:
    tree = ast.parse((RECIPES / f"{name}.py").read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    own = {module for module in modules if module and module.split(".")[0] == "ftaccum"}
    assert "ftaccum" in own
    assert own <= {"ftaccum", "ftaccum.losses", "ftaccum.callbacks"}
    names = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ftaccum"
    }
    assert names <= set(ftaccum.__all__)
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} - defined
    assert {attribute for attribute in attributes if re.match(r"_(?!_)", attribute)} == set()


def test_recipes_that_import_only_ftaccum_show_help_without_torch() -> None:
    code = """
import contextlib, runpy, sys
for file in sys.argv[1:]:
    sys.argv = [file, "--help"]
    with contextlib.suppress(SystemExit):
        runpy.run_path(file, run_name="__main__")
sys.exit("torch" in sys.modules)
"""
    with_torch = {"distillation", "embeddings", "plain_pytorch", "preference"}  # they define a module
    with_torch |= {"causal_lm", "chat"}  # they print with Accelerate
    names = sorted(set(NAMES) - with_torch)
    command = [sys.executable, "-c", code, *[str(RECIPES / f"{name}.py") for name in names]]
    environment = os.environ | {"PYTHONPATH": str(RECIPES)}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert output.count("--learning_rate") >= len(names)


def text_classification_words(folder: Path) -> list[str]:
    rows = folder / "rows.csv"
    rows.write_text("text,label\n" + "a good film,1\nthe very bad film,0\n" * 10, encoding="utf-8")
    return ["--model", save_encoder(folder / "encoder"), "--train_data", str(rows)]


def search_words(folder: Path) -> list[str]:
    return [*text_classification_words(folder), "--n_trials", "1", "--n_reports", "1", "--refit"]


def test_text_classification(tmp_path: Path) -> None:
    words = [*text_classification_words(tmp_path), "--max_updates", "2", "--output_dir", str(tmp_path / "out")]
    assert run_recipe("text_classification", *words) == 0
    assert "accuracy" in Result.load(tmp_path / "out").metrics[-1]
    assert pipeline("text-classification", str(tmp_path / "out" / "model"))("a film")[0]["label"] in ("0", "1")


def test_search(tmp_path: Path) -> None:
    words = [*search_words(tmp_path), "--n_epochs", "1", "--output_dir", str(tmp_path / "out")]
    assert run_recipe("search", *words, "--progress", "no") == 0
    assert "accuracy" in Result.load(tmp_path / "out" / "best").metrics[-1]
    assert pipeline("text-classification", str(tmp_path / "out" / "best" / "model"))("a film")


@pytest.mark.slow
@pytest.mark.processes
@recipe
def test_a_recipe_trains_equally_on_two_processes(name: str, tmp_path: Path) -> None:
    words = [*function_of(f"{name}_words")(tmp_path), "--progress", "no"]
    if name == "search":
        words += ["--n_epochs", "1"]
    else:
        words += ["--max_updates", "2", "--keep_checkpoints", "0", "--loss_head", "full"]
        if not {"--tokens_per_update", "--effective_batch_size"} & set(words):
            words += ["--batch_size", "2", "--effective_batch_size", "6"]
    config = ["--config_file", str(RECIPES / "two_cpu_processes.yaml"), "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *config, str(RECIPES / f"{name}.py"), *words]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "two")], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    two = Result.load(tmp_path / "two" / ("best" if name == "search" else ""))
    assert two.num_processes == 2
    if name == "search":
        return  # a larger update: its micro-batches are fixed
    assert run_recipe(name, *words, "--output_dir", str(tmp_path / "one")) == 0
    one = Result.load(tmp_path / "one")
    assert len(two.loss_history) == 2
    assert two.loss_history == pytest.approx(one.loss_history, rel=1e-5)
