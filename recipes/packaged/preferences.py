"""Preferences for answers that ask a question, made from the packaged conversations.

See `chats` for their source and license. All texts are real, but nobody compared the answers: the preference is
constructed. The chosen answer is the real one, and asks something; the rejected one is from another conversation, and
asks nothing.
"""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

from . import chats
from .chats import CHATS_TRAIN, CHATS_VAL
from .files import CACHE, letters_and_digits, prepare_missing, write_csv

PREFERENCES_TRAIN, PREFERENCES_VAL = CACHE / "preferences_train.csv", CACHE / "preferences_val.csv"
PATHS = (PREFERENCES_TRAIN, PREFERENCES_VAL)

Row: TypeAlias = tuple[str, str, str]

_FROM, _TO = 12, 60  # characters of a text: short ones fit most answers, and long ones take more time


def prepare() -> None:
    """Prepare a prompt, a chosen and a rejected answer from each conversation with a short answer of each kind.

    No text of the held-out rows is in a row to train on.
    """
    prepare_missing(chats)
    train, held_out = (as_preferences(_conversations(path)) for path in (CHATS_TRAIN, CHATS_VAL))
    for path, rows in ((PREFERENCES_TRAIN, without_texts_of(held_out, train)), (PREFERENCES_VAL, held_out)):
        write_csv(path, ("prompt", "chosen", "rejected"), rows)


def _conversations(file: Path) -> list[list[str]]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [[message["content"] for message in json.loads(line)["messages"]] for line in lines]


def as_preferences(conversations: Sequence[Sequence[str]]) -> list[Row]:
    """Return prompts with two answers: their own, which asks something, and one that does not.

    Each conversation gives the first of its short answers of each kind. Greetings, which come first, are left out.
    """
    asking, others = [], []
    for texts in conversations:
        pairs = [pair for pair in zip(texts[2::2], texts[3::2], strict=False) if all(map(_is_short, pair))]
        asking += [pair for pair in pairs if "?" in pair[1]][:1]
        others += [answer for _, answer in pairs if "?" not in answer][:1]
    random.Random(0).shuffle(asking)
    random.Random(1).shuffle(others)
    return [(prompt, answer, other) for (prompt, answer), other in zip(asking, others, strict=False)]


def without_texts_of(held_out: Iterable[Row], rows: Iterable[Row]) -> list[Row]:
    """Return the rows without those that share a text with the held-out rows. Letters and digits are compared."""
    texts = {letters_and_digits(text) for row in held_out for text in row}
    return [row for row in rows if texts.isdisjoint(map(letters_and_digits, row))]


def _is_short(text: str) -> bool:
    return _FROM <= len(text) <= _TO and "\n" not in text
