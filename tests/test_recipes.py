"""The recipes: their settings files, and runs of a few updates on tiny models and rows."""

from pathlib import Path

import pytest

from recipe_runs import RECIPES, run_recipe
from task_files import save_encoder

NAMES = sorted(file.stem for file in RECIPES.glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_has_a_settings_file_whose_settings_are_known(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_recipe(name, "--config", str(RECIPES / f"{name}.yaml"), "--help") == 0
    assert "--learning_rate" in capsys.readouterr().out


def test_text_classification(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "a good film,1\nthe very bad film,0\n" * 6, encoding="utf-8")
    words = ["--model", save_encoder(tmp_path / "encoder"), "--train_data", str(rows), "--max_updates", "2"]
    assert run_recipe("text_classification", *words, "--output_dir", str(tmp_path / "out")) == 0
    assert "Held-out accuracy: " in capsys.readouterr().out
