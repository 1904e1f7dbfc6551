"""Answers to questions: parts of a text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, EvalPrediction

from ..data.encode_table import encode_table
from ..data.tokenize import token_limit
from ..errors import DataError
from ..planning.shuffle import hold_out
from ..runtime.log import logger
from .answer_scores import exact_match, f1
from .answer_spans import best_answers
from .answers import Answers, check_texts, read_answers
from .arguments import NamedArguments
from .columns import Role
from .context_windows import FOR_METRICS, NOWHERE, ROW, ContextWindows
from .fast_tokenizer import check_fast
from .row_warnings import warn_of_rows
from .task import EncodingOptions, Task

_SHARED = 128  # tokens that windows share, as in BERT's script for SQuAD


class QuestionAnswering(Task):
    """Answers to questions that are parts of a text. A long text becomes several rows of tokens, its windows."""

    roles: ClassVar[Mapping[str, Role]] = {
        "question": Role(("question", "query")),
        "context": Role(("context", "passage", "paragraph", "text")),
        "answers": Role(("answers", "answer")),
        "answer_start": Role(("answer_start",), required=False),
    }
    targets: ClassVar[tuple[str, ...]] = ("answers", "answer_start")
    model_class = AutoModelForQuestionAnswering
    metrics = ("exact_match", "f1")

    _read: dict[str, list[Answers]]  # the answers that `head` has read, by the argument of their rows
    _encoder: ContextWindows
    _windows: Dataset  # of the rows that were encoded last, with the columns for metrics
    _right: list[tuple[str, ...]]  # the right answers to these rows
    _contexts: Dataset  # the column of their contexts

    def __init__(self, named: NamedArguments) -> None:
        super().__init__(named)
        self._read = {}

    def head(self, train: Dataset) -> dict[str, Any]:
        self._read["train_data"] = read_answers(train, "train_data")
        return {"num_labels": 2, "ignore_mismatched_sizes": True}  # a score of starts, and one of ends

    def encode(self, rows: Dataset, argument: str, processor: Any, model: Any, options: EncodingOptions) -> Dataset:
        check_fast(processor, self.named.task)
        limit = token_limit(processor, model.config, model, options.max_length)
        self._encoder = ContextWindows(processor, limit, self._stride(limit))
        texts = rows.select_columns(["question", "context"])
        check_texts(rows, argument)
        self._check_sizes(texts, argument)
        self._contexts, self._right = rows.select_columns(["context"]), []
        if "answers" in rows.column_names:
            answers = self._read.pop(argument, None) or read_answers(rows, argument)
            self._right = [each.texts for each in answers]
            texts = texts.add_column("start", [each.start for each in answers])
            texts = texts.add_column("end", [each.end for each in answers])
        self._windows = encode_table(texts, self._encoder, options.n_processes, argument)
        if "answers" in rows.column_names:
            self._warn_of_lost_answers(argument, [each.start >= 0 for each in answers])
        n_split = len(self._windows) - len(rows)
        if n_split:
            logger.info(
                f"{len(rows):,} rows of `{argument}` become {len(self._windows):,} windows of at most {limit} tokens"
            )
        return self._windows.remove_columns(list(FOR_METRICS))

    def hold_out(self, rows: Dataset, encoded: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset | None]:
        """Return the windows to train on, and those of the rows that are held out, so that no row is in both."""
        held = set(hold_out(len(rows), share, seed)[1])
        numbers = self._windows[ROW][:]
        parts = [[n for n, row in enumerate(numbers) if (row in held) == is_held] for is_held in (False, True)]
        self._windows = self._windows.select(parts[1])
        return encoded.select(parts[0]), encoded.select(parts[1])

    def evaluation_arguments(self, processor: Any, model: Any) -> dict[str, Any]:  # noqa: ARG002
        metrics = AnswerMetrics(self._windows.select_columns(list(FOR_METRICS)), self._contexts, self._right)
        return {"compute_metrics": metrics, "preprocess_logits_for_metrics": starts_and_ends}

    def predicted_columns(self, predictions: Any, rows: Dataset, processor: Any, model: Any) -> dict[str, list[Any]]:  # noqa: ARG002
        texts = rows.select_columns(["question", "context"])
        windows = encode_table(texts, self._encoder, 1, "data")
        best = best_answers(predictions, windows)
        return {
            "prediction": [best[n].text(context) for n, context in enumerate(rows["context"])],
            "score": [math.exp(best[n].log_score) for n in range(len(rows))],
        }

    def _stride(self, limit: int | None) -> int:
        if self.named.doc_stride is not None:
            return self.named.doc_stride
        return _SHARED if limit is None else min(_SHARED, limit // 4)

    def _warn_of_lost_answers(self, argument: str, have_answers: Sequence[bool]) -> None:
        """Warn about rows that have an answer, but no window with the whole of it."""
        columns = (self._windows[name][:] for name in (ROW, "start_positions", NOWHERE))
        found = {row for row, start, nowhere in zip(*columns, strict=True) if start != nowhere}
        warn_of_rows(
            argument,
            [has_answer and row not in found for row, has_answer in enumerate(have_answers)],
            "have an answer that no window contains as a whole, so they are learned as questions without an answer. "
            "Set a greater `max_length` or `doc_stride`, or drop them.",
        )

    def _check_sizes(self, texts: Dataset, argument: str) -> None:
        """Raise DataError for the first question that leaves no room for more context than windows share."""
        limit, stride = self._encoder.limit, self._encoder.stride
        for n, room in enumerate(self._encoder.context_sizes(texts["question"][:]) if limit is not None else ()):
            if room <= stride:
                raise DataError(
                    f"In `{argument}`, row {n} has a question so long that {max(room, 0)} of {limit} tokens are left "
                    f"for its context, but windows of the context share {stride} tokens. Shorten it, or set a smaller "
                    "`doc_stride` or a greater `max_length`."
                )


def starts_and_ends(logits: Any, labels: Any) -> Any:  # noqa: ARG001
    """Return the scores of starts and of ends, each (windows, tokens), without other outputs of the model."""
    return logits[0], logits[1]


@dataclass(frozen=True)
class AnswerMetrics:
    """Exact match and F1 of the best answer in all windows of each row.

    Attributes:
        windows: the windows, in the order of their predictions, with the columns `FOR_METRICS`.
        contexts: the contexts of all rows.
        right: the right answers of all rows.
    """

    windows: Dataset
    contexts: Dataset
    right: Sequence[Sequence[str]]

    def __call__(self, evaluated: EvalPrediction) -> dict[str, float]:
        best = best_answers(evaluated.predictions, self.windows)
        contexts = self.contexts["context"]
        pairs = [(span.text(contexts[row]), self.right[row]) for row, span in best.items()]
        return {
            "exact_match": float(np.mean([exact_match(text, right) for text, right in pairs])),
            "f1": float(np.mean([f1(text, right) for text, right in pairs])),
        }
