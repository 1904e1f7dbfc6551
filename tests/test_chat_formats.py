"""What OpenAI's format of conversations has besides texts: parts, weights and calls of tools."""

import json
from typing import Any

import pytest

from chats import MARKED, PLAIN, learned, tokenizer_with
from ftaccum import DataError
from ftaccum.tasks.chat_tokens import encoded, prompt_tokens
from ftaccum.tasks.conversations import Conversation

CALLS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}ARGUMENTS{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
OBJECTS = CALLS.replace("ARGUMENTS", "{{ c.function.arguments | tojson }}")
TEXTS = CALLS.replace("ARGUMENTS", "{{ '' + c.function.arguments }}")
ARGUMENTS = {"city": "Köln", "days": 2}
USER = {"role": "user", "content": "Who?"}


def answers(messages: Any, template: str) -> list[str]:
    tokenizer = tokenizer_with(template)
    ids, labels, _ = encoded(Conversation.of_row({"messages": messages}), tokenizer, None)
    return learned({"input_ids": ids, "labels": labels}, tokenizer)


def called(arguments: Any) -> list[Any]:
    function = {"name": "weather", "arguments": arguments}
    return [USER, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}]


def test_parts_of_text_are_one_text() -> None:
    parts = [{"type": "text", "text": "Me"}, {"type": "text", "text": "."}]
    assert answers([USER, {"role": "assistant", "content": parts}], PLAIN) == ["Me.<|end|>"]


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("content", [[{"type": "image_url", "image_url": {"url": "a.png"}}], {"answer": 3}, 3, []])
def test_content_that_is_no_text_is_refused(role: str, content: Any) -> None:
    with pytest.raises(DataError, match=r"message 1 of `messages` has the content .*, but only text can be learned"):
        Conversation.of_row({"messages": [USER, {"role": role, "content": content}]})


def test_a_tool_may_return_an_object() -> None:
    result = {"role": "tool", "content": {"degrees": 5}}
    assert Conversation.of_row({"messages": [USER, result]}).messages[1] == result


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_answers_with_a_weight_of_0_are_not_learned(template: str) -> None:
    turns = [{"role": "assistant", "content": text, "weight": n % 2} for n, text in enumerate("abc")]
    assert answers([turns[1], USER, turns[0], USER, turns[1], USER, turns[2]], MARKED) == ["b<|end|>"] * 2
    assert answers([USER, turns[0], USER, turns[1], USER, turns[2]], template) == ["b<|end|>"]
    with pytest.raises(DataError, match=r"message 1 of `messages` has the weight 0\.5, but must have 1"):
        Conversation.of_row({"messages": [USER, {**turns[0], "weight": 0.5}]})


@pytest.mark.parametrize("template", [OBJECTS, TEXTS])
def test_arguments_of_calls_are_encoded_once(template: str) -> None:
    text = json.dumps(ARGUMENTS, ensure_ascii=False)
    assert answers(called(text), template) == [f"weather{text}<|end|>"]
    tokenizer = tokenizer_with(template)
    asked = Conversation.of_row({"messages": [*called(text), USER]})
    assert f"weather{text}<|end|>" in tokenizer.decode(prompt_tokens(asked, tokenizer))


def test_a_call_that_the_template_does_not_write_is_refused() -> None:
    with pytest.raises(DataError, match="does not write the call of 'weather' in message 1"):
        answers(called(ARGUMENTS), PLAIN)
    with pytest.raises(DataError, match="message 1 of `messages` has a `function_call`"):
        Conversation.of_row({"messages": [USER, {"role": "assistant", "content": "", "function_call": {"name": "f"}}]})


def test_a_completion_may_be_json() -> None:
    for text in ('[{"name": "Ann"}]', '[{"name": "Ann"}, {"role": 3}]'):
        conversation = Conversation.of_row({"prompt": '[{"text": "Ann"}] Who?', "completion": text})
        assert [message["content"] for message in conversation.messages] == ['[{"text": "Ann"}] Who?', text]
