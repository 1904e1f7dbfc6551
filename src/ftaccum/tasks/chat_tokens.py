"""Convert conversations to token ids and labels. Only the assistant's answers are labelled."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ftaccum import DataError

IGNORED = -100

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encoded(messages: Any, tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """Return a conversation as `input_ids` and `labels`.

    Tokens of answers, including the end of turn, are labelled; all others have the label -100. Tokens beyond
    `max_length` are cut off at the end, so that every remaining answer keeps its full context. Cutting at the start
    would lose the system prompt and might begin in the middle of a sentence.

    Raises:
        DataError: if the messages are invalid, or if the template does not show where an answer begins and ends.
    """
    messages = _checked(messages)
    try:
        if _GENERATION_MARK.search(tokenizer.get_chat_template()):
            ids, answers = _marked(messages, tokenizer)
        else:
            ids, answers = _by_prefixes(messages, tokenizer, max_length)
    except DataError:
        raise
    except Exception as error:  # templates may raise anything
        raise DataError(f"The chat template cannot format these messages: {error}. Fix or drop them.") from error
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
    # In a table, every message has all keys that any message has; the others are None.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _marked(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Tokenise with a template that marks answers with {% generation %} and {% endgeneration %}."""
    written = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return written["input_ids"], [bool(mark) for mark in written["assistant_masks"]]


def _by_prefixes(messages: list[dict[str, Any]], tokenizer: Any, max_length: int) -> tuple[list[int], list[bool]]:
    """Tokenise with any template. Find each answer by formatting the conversation up to its start and to its end."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    # Tokenise the whole text at once: tokens may span its parts. The template adds the special tokens.
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, ends = tokens["input_ids"][:max_length], [end for _, end in tokens["offset_mapping"][:max_length]]
    answers = [False] * len(ids)
    for start, end in _spans(messages, tokenizer, text):
        if start >= ends[-1]:
            break
        # A token belongs to the span in which it ends: it may start with the prompt's last space.
        for place in range(bisect_right(ends, start), bisect_right(ends, end)):
            answers[place] = True
    return ids, answers


def _spans(messages: list[dict[str, Any]], tokenizer: Any, text: str) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each answer in `text`."""
    special = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if not n:
            raise DataError("The first message has the role 'assistant'. Add the message that it answers before it.")
        asked = tokenizer.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(messages[: n + 1], tokenize=False)
        if not (answered.startswith(asked) and text.startswith(answered)):
            raise DataError(
                f"The chat template formats the messages before message {n} differently if more follow, so the "
                "position of this answer cannot be determined. Mark answers in the template with {% generation %} and "
                "{% endgeneration %}, or shorten the conversation to one answer."
            )
        # A template may add a newline after the end of turn, which a model never generates.
        stripped = answered.rstrip()
        yield len(asked), len(stripped) if stripped.endswith(special) and len(stripped) > len(asked) else len(answered)
