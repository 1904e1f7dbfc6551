"""The right one of several answers to a text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import AutoModelForMultipleChoice

from ..data.encode_table import encode_table
from ..data.tokenize import token_limit
from ..errors import DataError
from ..metrics import Accuracy
from ..runtime.log import logger
from .columns import Role
from .row_warnings import warn_of_rows
from .task import EncodingOptions, Task

_CUT = "was_cut"


class MultipleChoice(Task):
    """The right one of several answers to a text. All rows have the same number of answers."""

    roles: ClassVar[Mapping[str, Role]] = {
        "context": Role(("context", "ctx", "question", "premise", "sent1", "text")),
        "choices": Role(("choices", "endings", "options", "answers")),
        "label": Role(("label", "labels", "answer", "answer_key")),
    }
    model_class = AutoModelForMultipleChoice
    metrics = ("accuracy",)

    def head(self, train: Dataset) -> dict[str, Any]:
        if min(_numbers(train, "train_data")) > 0 and all(str(label).isdecimal() for label in train["label"]):
            logger.warning("No row has choice 0 as its right answer. Do the labels start at 1?")
        return {}

    def encode(self, rows: Dataset, argument: str, processor: Any, model: Any, options: EncodingOptions) -> Dataset:
        limit = token_limit(processor, model.config, model, options.max_length)
        numbers = _numbers(rows, argument) if "label" in rows.column_names else None
        table = rows.select_columns(["context", "choices"])
        encoded = encode_table(table, _Choices(processor, limit), options.n_processes, argument)
        warn_of_rows(argument, encoded[_CUT][:], f"are longer than {limit} tokens, and their contexts are truncated.")
        encoded = encoded.remove_columns(_CUT)
        return encoded if numbers is None else encoded.add_column("labels", numbers)

    def evaluation_arguments(self, processor: Any, model: Any) -> dict[str, Any]:  # noqa: ARG002
        return {"compute_metrics": Accuracy()}

    def predicted_columns(self, predictions: Any, rows: Dataset, processor: Any, model: Any) -> dict[str, list[Any]]:  # noqa: ARG002
        best = np.asarray(predictions).argmax(-1).tolist()
        return {"choice": best, "prediction": [choices[n] for choices, n in zip(rows["choices"], best, strict=True)]}


@dataclass(frozen=True)
class _Choices:
    """Turns each context with each of its answers into tokens of one length, (choices, tokens) for a row."""

    tokenizer: Any
    limit: int | None

    def __call__(self, batch: Mapping[str, list[Any]], positions: Sequence[int]) -> dict[str, list[Any]]:  # noqa: ARG002
        rows = [
            self._row(context, choices) for context, choices in zip(batch["context"], batch["choices"], strict=True)
        ]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _row(self, context: str, choices: Sequence[str]) -> dict[str, Any]:
        contexts = [context] * len(choices)
        whole = self.tokenizer(contexts, list(choices), padding=True)
        if self.limit is None or len(whole["input_ids"][0]) <= self.limit:
            return {**whole, _CUT: False}
        cut = self.tokenizer(contexts, list(choices), padding=True, truncation="only_first", max_length=self.limit)
        return {**cut, _CUT: True}


def _numbers(rows: Dataset, argument: str) -> list[int]:
    """Return the number of each row's right answer, from 0 on.

    Raises:
        DataError: naming the first row whose columns do not fit.
    """
    _check_columns(rows, argument)
    pairs = list(zip(rows["label"], rows["choices"], strict=True))
    read = {way: [find(label, choices) for label, choices in pairs] for way, find in _WAYS.items()}
    whole = {way: numbers for way, numbers in read.items() if None not in numbers}
    for n, (label, choices) in enumerate(pairs):
        found = {way: numbers[n] for way, numbers in (whole or read).items() if numbers[n] is not None}
        name, n_choices = f"In `{argument}`, row {n}", len(choices)
        if not found:
            raise DataError(
                f"{name} has the label {label!r}, but the label of {n_choices} choices is a number from 0 to "
                f"{n_choices - 1}, a letter from A on, or the text of a choice. Fix or drop the row."
            )
        if len(set(found.values())) > 1:
            raise DataError(
                f"{name} has the label {label!r}, which is {' and '.join(found)} of different choices: "
                f"{choices!r:.80}. Give the labels of all rows as whole numbers from 0 on."
            )
    return [
        next(number for number in numbers if number is not None)
        for numbers in zip(*(whole or read).values(), strict=True)
    ]


def _check_columns(rows: Dataset, argument: str) -> None:
    """Raise DataError for the first row whose context or choices are something else."""
    n_choices = None
    for n, (context, choices) in enumerate(zip(rows["context"], rows["choices"], strict=True)):
        name = f"In `{argument}`, row {n}"
        if not isinstance(context, str):
            raise DataError(f"{name} has {context!r:.60} instead of a text as its context. Fix or drop the row.")
        if not (isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices)):
            raise DataError(
                f"{name} has {choices!r:.60} instead of a list of texts as its choices. Fix or drop the row."
            )
        n_choices = n_choices or len(choices)
        if len(choices) != n_choices:
            raise DataError(
                f"{name} has {len(choices)} choices, but the first row has {n_choices}. Give all rows the same number."
            )


def _of_number(label: Any, choices: Sequence[str]) -> int | None:
    number = int(label) if isinstance(label, str) and label.isdecimal() else label
    is_number = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(choices)
    return number if is_number else None


def _of_letter(label: Any, choices: Sequence[str]) -> int | None:
    is_letter = isinstance(label, str) and len(label) == 1 and label.isalpha() and label.isascii()
    return _of_number(ord(label.upper()) - ord("A"), choices) if is_letter else None


def _of_text(label: Any, choices: Sequence[str]) -> int | None:
    return choices.index(label) if label in choices else None


# What a label may be: each function returns the number of the choice that it names, or None. All labels are read in one
# way if there is one for all of them: those of choices such as "1" and "2" could be texts in some rows only.
_WAYS: dict[str, Callable[[Any, Sequence[str]], int | None]] = {
    "the number": _of_number, "the letter": _of_letter, "the text": _of_text,
}  # fmt: skip
