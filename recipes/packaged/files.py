"""Download Python packages, and write the files that are prepared from them."""

import csv
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "packaged"


@contextmanager
def unpacked(*packages: str) -> Iterator[Path]:
    """Hold a temporary folder with the unpacked packages, without their dependencies."""
    with tempfile.TemporaryDirectory() as folder:
        _pip("install", "--no-deps", "--target", folder, *packages)
        yield Path(folder)


@contextmanager
def unpacked_source(package: str) -> Iterator[Path]:
    """Hold a temporary folder with the unpacked source distribution of a package, whose wheel lacks some files."""
    with tempfile.TemporaryDirectory() as folder:
        _pip("download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", folder, package)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder)


def beside(path: Path) -> Path:
    """Return a sibling path to write to before renaming, so that a partial file never looks complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half_done = path.with_name(path.name + ".part")
    if half_done.is_dir():
        shutil.rmtree(half_done)
    return half_done


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows to a CSV file, which appears only when it is complete."""
    with beside(path).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    beside(path).rename(path)


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write rows as JSON lines to a file, which appears only when it is complete."""
    with beside(path).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    beside(path).rename(path)


def install(package: str) -> None:
    """Install a package without its dependencies, which only its own code would need."""
    _pip("install", "--no-deps", package)


def _pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *words, "--quiet"], check=True)


def say(sentence: str) -> None:
    """Print a sentence on standard error."""
    print(sentence, file=sys.stderr, flush=True)
