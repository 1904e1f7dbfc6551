"""Calls of tools in the messages of a conversation, and what a chat template writes of them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..errors import DataError

Messages = Sequence[Mapping[str, Any]]


def with_written_calls(messages: Messages, write: Callable[[Messages], str]) -> Messages:
    """Return messages whose calls a template writes once, and as they are.

    OpenAI's format has the arguments of a call as JSON text. Some templates write it as it is, others would encode it a
    second time: for these, it becomes an object.

    Args:
        write: formats messages.

    Raises:
        DataError: if the template leaves out a call, so that the answer would be learned without it.
    """
    calls = [(n, call) for n, message in enumerate(messages) for call in _functions(message)]
    if not calls:
        return messages
    text = write(messages)
    for n, call in calls:
        if str(call.get("name", "")) not in text:
            raise DataError(
                f"The chat template does not write the call of {call['name']!r} in message {n}, so that nothing of it "
                "would be learned. Give a template for tools with `chat_template`, or write the call as content."
            )
    if any(json.dumps(call["arguments"], ensure_ascii=False) in text for _, call in calls if _is_encoded(call)):
        return [_with_objects(message) for message in messages]
    return messages


def _functions(message: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the name and the arguments of each call."""
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            yield function


def _is_encoded(function: Mapping[str, Any]) -> bool:
    return isinstance(function.get("arguments"), str)


def _with_objects(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if not any(map(_is_encoded, _functions(message))):
        return message
    calls = [
        {**call, "function": _decoded(call["function"])} if "function" in call else _decoded(call)
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _decoded(function: Mapping[str, Any]) -> Mapping[str, Any]:
    with suppress(ValueError):
        if _is_encoded(function):
            return {**function, "arguments": json.loads(function["arguments"])}
    return function
