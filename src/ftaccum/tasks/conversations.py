"""Conversations in the forms that data sets have them, read as lists of messages."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.text_columns import show
from ..errors import DataError

ASSISTANT = "assistant"
# The columns of a row.
MESSAGES, PROMPT, COMPLETION, TOOLS, TEMPLATE_ARGUMENTS = (
    "messages", "prompt", "completion", "tools", "chat_template_kwargs",
)  # fmt: skip

_SHAREGPT = {
    "human": "user", "user": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "assistant": ASSISTANT,
    "model": ASSISTANT, "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
_EXAMPLE = "[{'role': 'user', 'content': 'Hello'}, …]"
_SPEAKER_KEYS = {"role", "from"}
_SPEAKERS = ("system", "developer", "user", ASSISTANT)  # whose content is text; results of tools may be objects


@dataclass(frozen=True)
class Conversation:
    """A conversation, and what its template gets besides.

    Attributes:
        messages: mappings with a role and, except for calls of tools, content.
        n_prompt: the number of messages at the start whose answers are not learned. Further ones are those with a
            weight of 0, as in OpenAI's format.
        tools: the tools that the assistant may call, as JSON schemas; None for none.
        template_arguments: further arguments of the chat template.
    """

    messages: Sequence[Mapping[str, Any]]
    n_prompt: int = 0
    tools: Sequence[Any] | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> list[int]:
        """The positions of the messages that are learned."""
        return [n for n, message in enumerate(self.messages) if n >= self.n_prompt and _is_learned(message)]

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Conversation":
        """Read a row with `messages`, or with `prompt` and `completion`. JSON strings are parsed.

        Raises:
            DataError: if a column has another form.
        """
        row = {name: _parsed(value, name) for name, value in row.items()}
        prompt: list[dict[str, Any]] = []
        if MESSAGES in row:
            messages = _messages(row[MESSAGES], MESSAGES)
        else:
            prompt = _turn(row[PROMPT], "user", PROMPT)
            messages = [*prompt, *_turn(row[COMPLETION], ASSISTANT, COMPLETION)]
        has_answer = any(message["role"] == ASSISTANT for message in prompt)
        tools, arguments = row.get(TOOLS), row.get(TEMPLATE_ARGUMENTS)
        _check_form(tools, list, TOOLS, "a list of JSON schemas")
        _check_form(arguments, Mapping, TEMPLATE_ARGUMENTS, "a dict such as {'enable_thinking': False}")
        return cls(messages, len(prompt) if has_answer else 0, tools or None, arguments or {})


def _parsed(value: Any, column: str) -> Any:
    """Return a value of a column without the keys that are None. Texts but those of prompts are read as JSON.

    In a table, every dict has all keys that any row's dict has; the others are None.
    """
    if isinstance(value, str) and (column not in (PROMPT, COMPLETION) or value.startswith('[{"')):
        try:
            parsed = json.loads(value)
        except ValueError as error:
            if column in (PROMPT, COMPLETION):
                return value
            raise DataError(f"`{column}` is {show(value)}, which is not JSON: {error}. Give a list or JSON.") from error
        if column in (PROMPT, COMPLETION) and not all(isinstance(m, dict) and m.keys() & _SPEAKER_KEYS for m in parsed):
            return value  # JSON that the assistant reads or writes
        value = parsed
    return _without_none(value)


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value


def _turn(value: Any, role: str, column: str) -> list[dict[str, Any]]:
    """Return a text as one message, and a list of messages as it is."""
    return [{"role": role, "content": value}] if isinstance(value, str) else _messages(value, column)


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(message, Mapping) for message in value):
        raise DataError(f"`{column}` must be a list such as {_EXAMPLE}, but is {show(value)} instead.")
    return [_message(message, f"message {n} of `{column}`") for n, message in enumerate(value)]


def _message(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    if "from" in message and "role" not in message:
        if message["from"] not in _SHAREGPT:
            known = ", ".join(map(repr, _SHAREGPT))
            raise DataError(f"{name} is from {show(message['from'])}, but must be from one of {known}.")
        message = {"role": _SHAREGPT[message["from"]], "content": message.get("value")}
    if not isinstance(message.get("role"), str):
        raise DataError(f"{name} has no role, only {', '.join(map(repr, message)) or 'nothing'}. Write {_EXAMPLE}.")
    if message.get("function_call"):
        raise DataError(f"{name} has a `function_call`, which chat templates do not know. Write it as `tool_calls`.")
    if message.get("content") is None and not message.get("tool_calls"):
        raise DataError(f"{name}, of the role {message['role']!r}, has no content. Write {_EXAMPLE}, or drop the row.")
    if message.get("weight", 1) not in (0, 1):
        raise DataError(
            f"{name} has the weight {show(message['weight'])}, but must have 1 to be learned, or 0. Fix it."
        )
    if "content" not in message:
        return dict(message)
    return {**message, "content": _content(message["content"], message["role"], name)}


def _content(content: Any, role: str, name: str) -> Any:
    """Return the content of a message, the texts of a list of parts joined.

    Most templates would write any other list as Python does, with brackets and quotes.
    """
    if isinstance(content, list) and content:
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
    if role in _SPEAKERS and not isinstance(content, str):
        raise DataError(
            f"{name} has the content {show(content)}, but only text can be learned. Write it as text, or drop the row."
        )
    return content


def _is_learned(message: Mapping[str, Any]) -> bool:
    return message["role"] == ASSISTANT and message.get("weight", 1) != 0


def _check_form(value: Any, form: type, column: str, words: str) -> None:
    if value is not None and not isinstance(value, form):
        raise DataError(f"`{column}` must be {words}, or None, but is {show(value)} instead.")
