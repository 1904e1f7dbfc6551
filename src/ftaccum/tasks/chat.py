"""Supervised fine-tuning on conversations, with the loss on the assistant's answers alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from transformers import AutoModelForCausalLM

from ..data.encode_table import encode_table
from ..data.tokenize import token_limit
from ..errors import DataError, SettingsError, refuse
from ..objective.item_counts import IGNORE_INDEX
from .arguments import NamedArguments
from .chat_tokens import encoded, prompt_tokens
from .columns import Role, naming
from .conversations import COMPLETION, MESSAGES, PROMPT, TEMPLATE_ARGUMENTS, TOOLS, Conversation
from .fast_tokenizer import check_fast
from .generated_text import generated_columns, generation_arguments
from .reading_direction import faults_of_reading_direction
from .row_warnings import warn_of_rows
from .task import EncodingOptions, Task
from .token_accuracy import TokenAccuracy, accuracy_arguments

_CUT, _ANSWERED = "was_cut", "is_answered"


class Chat(Task):
    """Conversations. The model learns the assistant's answers."""

    roles: ClassVar[Mapping[str, Role]] = {
        MESSAGES: Role(("messages", "conversations", "conversation"), required=False),
        PROMPT: Role(("prompt",), required=False),
        COMPLETION: Role(("completion",), required=False),
        TOOLS: Role(("tools",), required=False),
        TEMPLATE_ARGUMENTS: Role(("chat_template_kwargs",), required=False),
    }
    model_class = AutoModelForCausalLM
    metrics = TokenAccuracy.NAMES

    def __init__(self, named: NamedArguments) -> None:
        super().__init__(named)
        self._template = None if named.chat_template is None else _read(named.chat_template)

    def head(self, train: Dataset) -> dict[str, Any]:
        _check_columns(train, "train_data")
        return {}

    def encode(self, rows: Dataset, argument: str, processor: Any, model: Any, options: EncodingOptions) -> Dataset:
        """Return the rows as token ids and labels, without those that have no answer.

        Raises:
            DataError: if the chat template cannot format a conversation, or no conversation has an answer.
        """
        if self._template is not None:
            processor.chat_template = self._template  # saved with the model, too
        refuse(self._faults(processor) + faults_of_reading_direction(model))
        check_fast(processor, self.named.task)
        _check_columns(rows, argument)
        limit = token_limit(processor, model.config, model, options.max_length)
        columns = tuple(name for name in rows.column_names if name in self.roles)
        encode = _Encoder(argument, processor, limit, columns)
        tokens = encode_table(rows, encode, options.n_processes, argument)
        cut, answered = tokens[_CUT][:], tokens[_ANSWERED][:]
        within = "" if limit is None else f" within {limit} tokens"
        if not any(answered):
            raise DataError(
                f"No row of `{argument}` has an answer{within}. Raise `max_length`, or check the roles: the role of an "
                "answer is 'assistant'."
            )
        of_limit = f"are longer than {limit} tokens, the limit of `max_length`, the tokenizer or the model, and"
        warn_of_rows(argument, cut, f"{of_limit} are cut at the end.")
        warn_of_rows(argument, [not has for has in answered], f"have no answer{within} and are skipped.")
        tokens = tokens.remove_columns([_CUT, _ANSWERED])
        return tokens if all(answered) else tokens.select([n for n, has in enumerate(answered) if has])

    def evaluation_arguments(self, processor: Any, model: Any) -> dict[str, Any]:  # noqa: ARG002
        return accuracy_arguments(next_token=True)

    def encode_inputs(self, rows: Dataset, processor: Any, model: Any, options: EncodingOptions) -> Dataset:  # noqa: ARG002
        """Return the tokens of each conversation up to its last answer, which is left out."""
        refuse(self._faults(processor))
        columns = tuple(name for name in rows.column_names if name in self.roles)
        return encode_table(rows, _PromptEncoder(processor, columns), options.n_processes, "data")

    def prediction_arguments(self, processor: Any, model: Any, max_new_tokens: int | None) -> dict[str, Any]:  # noqa: ARG002
        return generation_arguments(max_new_tokens)

    def predicted_columns(self, predictions: Any, rows: Dataset, processor: Any, model: Any) -> dict[str, list[Any]]:  # noqa: ARG002
        return generated_columns(predictions, processor)

    def _faults(self, tokenizer: Any) -> list[str]:
        if tokenizer.chat_template is not None:
            return []
        return [
            f"The tokenizer of {self.named.tokenizer or self.named.model!r} has no chat template. Choose a chat model, "
            "often named -Instruct, or give a template with `chat_template`."
        ]


@dataclass(frozen=True)
class _Encoder:
    """A function for `encode_table` that tokenizes conversations.

    Attributes:
        argument: the argument that names the rows, for messages.
        limit: the most tokens of a row; None for no limit.
        columns: the columns to read.
    """

    argument: str
    tokenizer: Any
    limit: int | None
    columns: Sequence[str]

    def __call__(self, table: Mapping[str, list], positions: Sequence[int]) -> dict[str, list]:
        columns: dict[str, list] = {"input_ids": [], "labels": [], _CUT: [], _ANSWERED: []}
        for position, *values in zip(positions, *(table[name] for name in self.columns), strict=True):
            try:
                conversation = Conversation.of_row(dict(zip(self.columns, values, strict=True)))
                ids, labels, is_cut = encoded(conversation, self.tokenizer, self.limit)
            except DataError as error:
                raise DataError(f"In `{self.argument}`, row {position}: {error}") from error
            is_answered = any(label != IGNORE_INDEX for label in labels[1:])  # nothing predicts the first token
            for name, value in zip(columns, (ids, labels, is_cut, is_answered), strict=True):
                columns[name].append(value)
        return columns


@dataclass(frozen=True)
class _PromptEncoder:
    """A function that tokenizes conversations without their last answer.

    Attributes:
        columns: the columns to read.
    """

    tokenizer: Any
    columns: Sequence[str]

    def __call__(self, table: Mapping[str, list], positions: Sequence[int]) -> dict[str, list]:
        return {"input_ids": [self._tokens(table, n, position) for n, position in enumerate(positions)]}

    def _tokens(self, table: Mapping[str, list], n: int, position: int) -> list[int]:
        row = {COMPLETION: "", **{name: table[name][n] for name in self.columns}}
        try:
            return prompt_tokens(Conversation.of_row(row), self.tokenizer)
        except DataError as error:
            raise DataError(f"In `data`, row {position}: {error}") from error


def _check_columns(rows: Dataset, argument: str) -> None:
    names = rows.column_names
    if MESSAGES not in names and not (PROMPT in names and COMPLETION in names):
        raise DataError(
            f"`{argument}` has no column 'messages' or 'conversations', and no columns 'prompt' and 'completion', only "
            f"{', '.join(map(repr, names))}. Name the conversations: {naming('messages')}."
        )


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise SettingsError(
            [f"`chat_template` {file!r} cannot be read: {error}. Give a file with a Jinja template."]
        ) from error
