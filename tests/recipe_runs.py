"""Run a recipe in this process, as `python recipes/NAME.py` does."""

import runpy
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parent.parent / "recipes"


def run_recipe(name: str, *words: str) -> int:
    """Run a recipe, and return its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(RECIPES), *sys.path])
        patch.setattr(sys, "argv", [str(RECIPES / f"{name}.py"), *words])
        try:
            runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
        except SystemExit as done:
            return int(done.code or 0)
    return 0
