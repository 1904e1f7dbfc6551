"""Real models and data from Python packages, which work without access to the Hugging Face Hub.

They are not committed. `prepare` downloads and converts those that a recipe names into a folder that git ignores. Each
module here prepares one model or data set, names its source and its licence, and lists its files in `PATHS`.
"""

from typing import Any

from filelock import FileLock

from . import chats, digit_models, digits, minilm, movies, preferences, smollm, words
from .chats import CHATS_TRAIN, CHATS_VAL
from .digit_models import DIGIT_TEACHER, TINY_VIT
from .digits import DIGITS_TRAIN, DIGITS_VAL
from .files import CACHE
from .minilm import MINILM
from .movies import MOVIES_TRAIN, MOVIES_VAL
from .preferences import PREFERENCES_TRAIN, PREFERENCES_VAL
from .smollm import SMOLLM
from .words import WORDS_TRAIN, WORDS_VAL

__all__ = [
    "CACHE", "CHATS_TRAIN", "CHATS_VAL", "DIGITS_TRAIN", "DIGITS_VAL", "DIGIT_TEACHER", "MINILM", "MOVIES_TRAIN",
    "MOVIES_VAL", "PREFERENCES_TRAIN", "PREFERENCES_VAL", "SMOLLM", "TINY_VIT", "WORDS_TRAIN", "WORDS_VAL", "prepare",
]  # fmt: skip

_SOURCES = (chats, digit_models, digits, minilm, movies, preferences, smollm, words)


def prepare(*names: Any) -> None:
    """Prepare those of these paths that belong to packaged models or data and are missing. Ignore other values.

    With several processes, one prepares the files, and the others wait for it.
    """
    wanted = set(map(str, names))
    for source in _SOURCES:
        if wanted & set(map(str, source.PATHS)):
            CACHE.mkdir(parents=True, exist_ok=True)
            with FileLock(CACHE / ".lock"):
                if not all(path.exists() for path in source.PATHS):
                    source.prepare()
