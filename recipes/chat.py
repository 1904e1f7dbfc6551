"""Conversations to token ids, with labels on what the assistant is to learn to write and on nothing else."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ftaccum import DataError

IGNORED = -100

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encoded(messages: Any, tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """A conversation as `input_ids` and `labels`: an answer's tokens and its end of turn are labelled, all else -100.

    What goes beyond `max_length` is cut off at the end: what stays is the beginning of a conversation, in which every
    answer has all before it that it answers to. Cut at its head it would begin in mid-sentence, and lose the system
    prompt.

    Raises:
        DataError: where the messages are none, or the template does not show where an answer begins and ends.
    """
    messages = _checked(messages)
    try:
        if _GENERATION_MARK.search(tokenizer.get_chat_template()):
            ids, answers = _marked(messages, tokenizer)
        else:
            ids, answers = _by_prefixes(messages, tokenizer, max_length)
    except DataError:
        raise
    except Exception as error:  # templates raise what they like
        raise DataError(f"The chat template cannot write these messages: {error}. Fix or drop them.") from error
    labels = [token if answer else IGNORED for token, answer in zip(ids, answers, strict=True)]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def has_answer(labels: Sequence[int]) -> bool:
    return any(label != IGNORED for label in labels)


def _checked(messages: Any) -> list[dict[str, Any]]:
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(m, Mapping) and "role" in m for m in messages)
    ):
        raise DataError(
            "The messages must be a list such as [{'role': 'user', 'content': 'Hello'}, …], but are "
            f"{messages!r:.80} instead."
        )
    # Tables give every message all the keys that any message has.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _marked(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The template itself says what the assistant writes, between {% generation %} and {% endgeneration %}."""
    written = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return written["input_ids"], [bool(mark) for mark in written["assistant_masks"]]


def _by_prefixes(messages: list[dict[str, Any]], tokenizer: Any, max_length: int) -> tuple[list[int], list[bool]]:
    """Finds the answers in what the template writes of the conversation up to before and after each of them."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    # Tokenised as a whole, so that the tokens are those that the model knows; a template brings its special tokens.
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, ends = tokens["input_ids"][:max_length], [end for _, end in tokens["offset_mapping"][:max_length]]
    answers = [False] * len(ids)
    for start, end in _spans(messages, tokenizer, text):
        if start >= ends[-1]:
            break
        # A token belongs to where it ends: one that begins with the prompt's last space carries the answer's word.
        for place in range(bisect_right(ends, start), bisect_right(ends, end)):
            answers[place] = True
    return ids, answers


def _spans(messages: list[dict[str, Any]], tokenizer: Any, text: str) -> Iterator[tuple[int, int]]:
    """Where in `text` each answer begins and ends."""
    special = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if not n:
            raise DataError("The first message is the assistant's. Put before it what it answers to.")
        asked = tokenizer.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(messages[: n + 1], tokenize=False)
        if not (answered.startswith(asked) and text.startswith(answered)):
            raise DataError(
                f"The chat template writes the messages before message {n} otherwise once more follow, so that where "
                "this answer begins and ends cannot be told. Mark answers in the template with {% generation %} and "
                "{% endgeneration %}, or let the conversation have one answer."
            )
        # Behind the end of turn a template may break the line, which a model that has ended its turn never writes.
        stripped = answered.rstrip()
        yield len(asked), len(stripped) if stripped.endswith(special) and len(stripped) > len(asked) else len(answered)
