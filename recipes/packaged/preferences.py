"""Preferences for answers that ask a question, made from the packaged conversations.

See `chats` for their source and licence. All texts are real, but nobody compared the answers: the preference is
constructed. The chosen answer is the real one, and asks something; the rejected one is from another conversation, and
asks nothing.
"""

import json
import random
from collections.abc import Sequence

from . import chats
from .chats import CHATS_TRAIN, CHATS_VAL
from .files import CACHE, write_csv

PREFERENCES_TRAIN, PREFERENCES_VAL = CACHE / "preferences_train.csv", CACHE / "preferences_val.csv"
PATHS = (PREFERENCES_TRAIN, PREFERENCES_VAL)

_FROM, _TO = 12, 60  # characters of a text: short ones fit most answers, and long ones take more time


def prepare() -> None:
    """Prepare a prompt, a chosen and a rejected answer from each conversation with a short answer of each kind."""
    if not all(path.exists() for path in chats.PATHS):
        chats.prepare()
    for path, source in ((PREFERENCES_TRAIN, CHATS_TRAIN), (PREFERENCES_VAL, CHATS_VAL)):
        with source.open(encoding="utf-8") as file:
            conversations = [[message["content"] for message in json.loads(line)["messages"]] for line in file]
        write_csv(path, ("prompt", "chosen", "rejected"), as_preferences(conversations))


def as_preferences(conversations: Sequence[Sequence[str]]) -> list[tuple[str, str, str]]:
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


def _is_short(text: str) -> bool:
    return _FROM <= len(text) <= _TO and "\n" not in text
