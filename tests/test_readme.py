"""README and docs: the first Python block runs, commands parse, and links resolve."""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftaccum.apps.options import OPTIONS
from ftaccum.apps.parser import parse

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts),
]

page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(path: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language, in order."""
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def shell_commands(path: Path) -> Iterator[list[str]]:
    """Yield the words of each command in the shell blocks, continued lines joined and comments left out."""
    for block in blocks(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def ftaccum_commands(path: Path) -> Iterator[list[str]]:
    """Yield what comes after `ftaccum`, however it is launched."""
    for words in shell_commands(path):
        if "ftaccum" in words:
            yield words[words.index("ftaccum") + 1 :]


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_first_python_block_of_readme_runs_and_is_exact(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    block, *_ = blocks(README, "python")
    assert "n_epochs=5" in block
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block.replace("n_epochs=5", "n_epochs=1"), str(README), "exec"), names)
    result = names["result"]
    assert result.effective_batch_size == 32
    assert result.final_loss < result.initial_loss
    assert all(audit["error"] <= audit["tolerance"] for audit in result.audits)


@page
def test_python_blocks_compile(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


def test_readme_shows_the_commands() -> None:
    assert {"train", "search"} <= {command for command, *_ in ftaccum_commands(README)}


@page
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("{}")  # a file of settings that commands name
    for command, *words in ftaccum_commands(page):
        parse(OPTIONS[command], list(itertools.dropwhile(lambda word: not word.startswith("-"), words)))  # after RUN


@page
def test_commands_name_files_that_exist(page: Path) -> None:
    for words in shell_commands(page):
        for word in words:
            if re.match(r"(scripts|recipes)/", word):
                assert (ROOT / word).exists(), f"{page.name}: {word}"


@page
def test_scripts_that_printed_figures_exist(page: Path) -> None:
    for script in re.findall(r"`(scripts/[\w.]+)", page.read_text(encoding="utf-8")):
        assert (ROOT / script).exists() or (ROOT / f"{script}.py").exists(), f"{page.name}: {script}"


@page
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if target.startswith("http"):
            continue
        path = page if not target else page.parent / target
        assert path.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {link}"
