"""Real models and data from Python packages, which work without access to the Hugging Face Hub.

They are not committed. `prepare` downloads and converts those that a recipe names into a folder that git ignores. Each
module here prepares one model or data set, names its source and its license, and lists its files in `PATHS`.
"""

from typing import Any

from filelock import FileLock

from . import (
    addresses,
    chats,
    choices,
    digit_models,
    digits,
    glosses,
    letters_t5,
    minilm,
    movies,
    preferences,
    pronunciations,
    questions,
    small_llama,
    small_vit,
    smollm,
    wordnet,
    words,
)  # fmt: skip
from .addresses import ADDRESSES_TRAIN, ADDRESSES_VAL
from .chats import CHATS_TRAIN, CHATS_VAL
from .choices import CHOICES_TRAIN, CHOICES_VAL
from .digit_models import DIGIT_TEACHER, TINY_VIT
from .digits import DIGITS_TRAIN, DIGITS_VAL
from .files import CACHE, prepare_missing
from .glosses import GLOSSES_TRAIN, GLOSSES_VAL
from .letters_t5 import LETTERS_T5
from .minilm import MINILM
from .movies import MOVIES_TRAIN, MOVIES_VAL
from .preferences import PREFERENCES_TRAIN, PREFERENCES_VAL
from .pronunciations import PRONUNCIATIONS_TRAIN, PRONUNCIATIONS_VAL
from .questions import QUESTIONS_TRAIN, QUESTIONS_VAL
from .small_llama import SMALL_LLAMA
from .small_vit import SMALL_VIT
from .smollm import SMOLLM
from .words import WORDS_TRAIN, WORDS_VAL

__all__ = [
    "ADDRESSES_TRAIN", "ADDRESSES_VAL", "CACHE", "CHATS_TRAIN", "CHATS_VAL", "CHOICES_TRAIN", "CHOICES_VAL",
    "DIGITS_TRAIN", "DIGITS_VAL", "DIGIT_TEACHER", "GLOSSES_TRAIN", "GLOSSES_VAL", "LETTERS_T5", "MINILM",
    "MOVIES_TRAIN", "MOVIES_VAL", "PREFERENCES_TRAIN", "PREFERENCES_VAL", "PRONUNCIATIONS_TRAIN",
    "PRONUNCIATIONS_VAL", "QUESTIONS_TRAIN", "QUESTIONS_VAL", "SMALL_LLAMA", "SMALL_VIT", "SMOLLM", "TINY_VIT",
    "WORDS_TRAIN", "WORDS_VAL", "prepare",
]  # fmt: skip

_SOURCES = (
    addresses, chats, choices, digit_models, digits, glosses, letters_t5, minilm, movies, preferences,
    pronunciations, questions, small_llama, small_vit, smollm, wordnet, words,
)  # fmt: skip


def prepare(*names: Any) -> None:
    """Prepare those of these paths that belong to packaged models or data and are missing. Ignore other values.

    With several processes, one prepares the files, and the others wait for it.
    """
    wanted = set(map(str, names))
    for source in _SOURCES:
        if wanted & set(map(str, source.PATHS)):
            CACHE.mkdir(parents=True, exist_ok=True)
            with FileLock(CACHE / ".lock"):
                prepare_missing(source)
