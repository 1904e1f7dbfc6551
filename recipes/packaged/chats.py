"""Conversations of two people, MIT (package chitchat-dataset).

From W. Myers, T. Etchart and N. Fulda, "Conversational Scaffolding", 2020.
"""

import itertools
import json
import random
from collections.abc import Mapping
from typing import Any

from .files import CACHE, unpacked, write_jsonl

CHATS_TRAIN, CHATS_VAL = CACHE / "chitchat_train.jsonl", CACHE / "chitchat_val.jsonl"
PATHS = (CHATS_TRAIN, CHATS_VAL)
CHATS_PACKAGE, CHATS_FILE = "chitchat-dataset==0.9.0", "chitchat_dataset/dataset.json"

_HELD_OUT = 300
_FEWEST_TURNS = 4  # shorter conversations are mostly greetings


def prepare() -> None:
    """Prepare conversations of at least two exchanges, as JSON lines {"messages": [...]}.

    The same 300 conversations are always held out. Some people speak in both parts.
    """
    with unpacked(CHATS_PACKAGE, megabytes=8) as folder:
        conversations = json.loads((folder / CHATS_FILE).read_text(encoding="utf-8"))
    chats = [messages for messages in map(as_messages, conversations.values()) if len(messages) >= _FEWEST_TURNS]
    random.Random(0).shuffle(chats)
    for path, part in ((CHATS_VAL, chats[:_HELD_OUT]), (CHATS_TRAIN, chats[_HELD_OUT:])):
        write_jsonl(path, ({"messages": messages} for messages in part))


def as_messages(conversation: Mapping[str, Any]) -> list[dict[str, str]]:
    """Convert a conversation between two people to chat messages. The first speaker becomes the user.

    Consecutive texts of one person become one message, with one line for each text. Empty texts, and a last message of
    the user without an answer, are dropped.
    """
    said = [(line["sender"], line["text"].strip()) for turn in conversation["messages"] for line in turn]
    said = [(sender, text) for sender, text in said if text]
    messages = [
        {"role": "user" if is_first else "assistant", "content": "\n".join(text for _, text in lines)}
        for is_first, lines in itertools.groupby(said, key=lambda line: line[0] == said[0][0])
    ]
    return messages[: len(messages) // 2 * 2]
