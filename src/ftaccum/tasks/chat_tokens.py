"""Convert conversations to token ids and labels. Only the assistant's answers are labelled."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import DataError
from ..objective.item_counts import IGNORE_INDEX
from .conversations import ASSISTANT, Conversation
from .tool_calls import with_written_calls

_GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_REMEDY = (
    "Mark answers in the template with {% generation %} and {% endgeneration %} (`chat_template` names a file), or "
    "shorten the conversation to one answer."
)


def encoded(conversation: Conversation, tokenizer: Any, limit: int | None) -> tuple[list[int], list[int], bool]:
    """Return the token ids and labels of a conversation, and whether it was cut.

    Tokens of answers, including the end of turn, are labelled; all others have the label -100. Tokens beyond the limit
    are cut off at the end, so that every remaining answer keeps its full context. Cutting at the start would lose the
    system prompt and might begin in the middle of a sentence.

    Raises:
        DataError: if the template cannot format the messages, or does not show where an answer begins and ends.
    """
    try:
        template = _Template(tokenizer, _with_written_calls(conversation, tokenizer))
        ids, answers = template.marked() if template.marks_answers else template.by_prefixes(limit)
    except DataError:
        raise
    except Exception as error:  # templates may raise anything
        raise DataError(f"The chat template cannot format these messages: {error}. Fix or drop them.") from error
    labels = [token if is_answer else IGNORE_INDEX for token, is_answer in zip(ids, answers, strict=True)]
    return ids[:limit], labels[:limit], limit is not None and len(ids) > limit


def prompt_tokens(conversation: Conversation, tokenizer: Any) -> list[int]:
    """Return the token ids of a conversation up to the start of its last answer, which is left out.

    Raises:
        DataError: if the template cannot format the messages, or there is nothing to answer.
    """
    messages = list(conversation.messages)
    if messages and messages[-1]["role"] == ASSISTANT:
        messages.pop()
    if not messages:
        raise DataError("there is no message to answer. Add one, or drop the row.")
    more = {"tools": conversation.tools, **conversation.template_arguments}
    try:
        asked = _with_written_calls(replace(conversation, messages=messages), tokenizer).messages
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **more)
    except DataError:
        raise
    except Exception as error:  # templates may raise anything
        raise DataError(f"The chat template cannot format these messages: {error}. Fix or drop them.") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _with_written_calls(conversation: Conversation, tokenizer: Any) -> Conversation:
    template = _Template(tokenizer, conversation)
    return replace(conversation, messages=with_written_calls(conversation.messages, template.text))


class _Template:
    """The chat template of a tokenizer, applied to one conversation."""

    def __init__(self, tokenizer: Any, conversation: Conversation) -> None:
        self._tokenizer, self._conversation = tokenizer, conversation

    @property
    def marks_answers(self) -> bool:
        """Whether the template marks answers with {% generation %} and {% endgeneration %}."""
        text = self._tokenizer.get_chat_template(tools=self._conversation.tools)
        return bool(_GENERATION_MARK.search(text))

    def marked(self) -> tuple[list[int], list[bool]]:
        """Tokenize with a template that marks answers."""
        messages, others = self._conversation.messages, self._not_learned()
        more = {"tokenizer_kwargs": {"return_offsets_mapping": True}} if others else {}
        written = self._apply(messages, return_dict=True, return_assistant_tokens_mask=True, **more)
        answers = [bool(mark) for mark in written["assistant_masks"]]
        if others:
            text, ends = self.text(messages), [end for _, end in written["offset_mapping"]]
        for first, last in others:
            before, part = self.text(messages[:first]) if first else "", self.text(messages[:last])
            if not (part.startswith(before) and text.startswith(part)):
                raise DataError(_changed(last))
            for place in range(bisect_right(ends, len(before)), bisect_right(ends, len(part))):
                answers[place] = False
        return written["input_ids"], answers

    def _not_learned(self) -> list[tuple[int, int]]:
        """Return the first message and the one after the last of each part whose answers are not learned."""
        conversation, n_prompt = self._conversation, self._conversation.n_prompt
        learned = conversation.answers
        prompt = [(0, n_prompt)] if n_prompt else []
        answers = (n for n, message in enumerate(conversation.messages) if message["role"] == ASSISTANT)
        return prompt + [(n, n + 1) for n in answers if n >= n_prompt and n not in learned]

    def by_prefixes(self, limit: int | None) -> tuple[list[int], list[bool]]:
        """Tokenize with any template. Find each answer by formatting the messages up to its start and to its end."""
        text = self.text(self._conversation.messages)
        # Tokenize the whole text at once: tokens may span its parts. The template adds the special tokens.
        tokens = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, ends = tokens["input_ids"], [end for _, end in tokens["offset_mapping"]]
        answers = [False] * len(ids)
        for start, end in self._spans(text):
            if start >= ends[:limit][-1]:
                break
            # A token belongs to the span in which it ends: it may start with the prompt's last space.
            for place in range(bisect_right(ends, start), bisect_right(ends, end)):
                answers[place] = True
        return ids, answers

    def _spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield the start and end of each answer in `text`."""
        special = tuple(str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special)
        messages = self._conversation.messages
        for n in self._conversation.answers:
            answered = self.text(messages[: n + 1])
            asked = self.text(messages[:n], add_generation_prompt=True) if n else self._before_first(answered)
            if not (answered.startswith(asked) and text.startswith(answered)):
                raise DataError(_changed(n))
            # A template may add a newline after the end of turn, which a model never generates.
            stripped = answered.rstrip()
            yield (
                len(asked),
                len(stripped) if stripped.endswith(special) and len(stripped) > len(asked) else len(answered),
            )

    def _before_first(self, answered: str) -> str:
        """Return the text before an answer that is the first message: up to the template's start of answers."""
        question = [{"role": "user", "content": "?"}]
        before, after = self.text(question), self.text(question, add_generation_prompt=True)
        start = after.removeprefix(before)
        if start in ("", after) or start not in answered:
            raise DataError(
                f"The first message has the role {ASSISTANT!r}, and the chat template does not show where it begins. "
                "Add the message that it answers before it, or mark answers in the template with {% generation %}."
            )
        return answered[: answered.index(start) + len(start)]

    def text(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> str:
        return self._apply(messages, tokenize=False, **more)

    def _apply(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> Any:
        conversation = self._conversation
        return self._tokenizer.apply_chat_template(
            messages, tools=conversation.tools, **more, **conversation.template_arguments
        )


def _changed(n: int) -> str:
    return (
        f"The chat template formats the messages before message {n} differently if more follow, so the position of "
        f"this answer cannot be determined. {_REMEDY}"
    )
