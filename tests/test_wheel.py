"""The wheel has everything that a user needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_readme import README, ROOT, blocks


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_wheel_runs_the_first_block_of_readme_in_an_empty_environment(tmp_path: Path) -> None:
    def run(*command: str) -> str:
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    python, constraints = str(tmp_path / "venv" / "bin" / "python"), str(ROOT / "constraints.txt")
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("ftaccum-*.whl")
    (torch,) = (line for line in Path(constraints).read_text().splitlines() if line.startswith("torch=="))
    for wanted in (torch, str(wheel)):
        run(python, "-m", "pip", "install", "--quiet", "--constraint", constraints, wanted)
    block, *_ = blocks(README, "python")
    said = run(python, "-c", block + "\nprint(ftaccum.__file__)")
    assert str(tmp_path / "venv") in said.splitlines()[-1]  # not the code in this folder
    run(str(tmp_path / "venv" / "bin" / "ftaccum"), "--help")
