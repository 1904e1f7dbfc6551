"""A tag for each word of a text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score
from transformers import AutoModelForTokenClassification, EvalPrediction

from ..data.encode_table import encode_table
from ..data.tokenize import token_limit
from ..objective.item_counts import IGNORE_INDEX
from ..runtime.log import logger
from .columns import Role
from .entities import entity_scores, mark_entities
from .fast_tokenizer import check_fast
from .row_warnings import warn_of_rows
from .tagged_words import CUT, N_LOST, TaggedWords
from .tags import Tags, check_words, class_names, words_of
from .task import EncodingOptions, Task


class TokenClassification(Task):
    """A tag for each word of a text: entities in BIO tags and the like, or plain classes such as parts of speech."""

    roles: ClassVar[Mapping[str, Role]] = {
        "tokens": Role(("tokens", "words")),
        "tags": Role(("ner_tags", "tags", "labels", "pos_tags")),
    }
    targets: ClassVar[tuple[str, ...]] = ("tags",)
    model_class = AutoModelForTokenClassification
    metrics = ("f1", "precision", "recall", "accuracy")

    tags: Tags
    _limit: int | None = None

    def head(self, train: Dataset) -> dict[str, Any]:
        self.tags = Tags.read(train, "train_data")
        names = dict(enumerate(self.tags.names))
        return {
            "id2label": names,
            "label2id": {name: n for n, name in names.items()},
            "ignore_mismatched_sizes": True,  # a new head for other tags, which is logged
        }

    def read_config(self, config: Any) -> None:
        self.tags = Tags(tuple(config.id2label[n] for n in range(config.num_labels)))

    def encode(self, rows: Dataset, argument: str, processor: Any, model: Any, options: EncodingOptions) -> Dataset:
        check_fast(processor, self.named.task)
        self._limit = token_limit(processor, model.config, model, options.max_length)
        columns = [name for name in ("tokens", "tags") if name in rows.column_names]
        if "tags" in columns:
            self.tags.check(rows, argument)
            encoder = TaggedWords(processor, self._limit, self.tags.numbers, class_names(rows))
        else:
            check_words(rows, argument)
            encoder = TaggedWords(processor, self._limit)
        table = rows.select_columns(columns)
        encoded = encode_table(table, encoder, options.n_processes, argument)
        self._warn(encoded, argument)
        return encoded.remove_columns([CUT, N_LOST])

    def evaluation_arguments(self, processor: Any, model: Any) -> dict[str, Any]:  # noqa: ARG002
        if mark_entities(self.tags.names):
            logger.info("Metrics: precision, recall and f1 of entities; accuracy of words")
        else:
            logger.info("Metrics: precision, recall and f1 of tags, each tag counting equally; the tags are not BIO")
        return {"compute_metrics": TagMetrics(self.tags.names), "preprocess_logits_for_metrics": best_tags}

    def predicted_columns(self, predictions: Any, rows: Dataset, processor: Any, model: Any) -> dict[str, list[Any]]:
        names = model.config.id2label
        best = np.asarray(predictions)
        words = [words_of(each) for each in rows["tokens"]]
        positions = TaggedWords(processor, self._limit).first_tokens(words)
        return {
            "prediction": [
                [None if position is None else names[int(row[position])] for position in found]
                for row, found in zip(best, positions, strict=True)
            ]
        }

    def _warn(self, encoded: Dataset, argument: str) -> None:
        """Warn about rows that were truncated or have nothing to learn, and log the number of words without tokens."""
        cut, lost = encoded[CUT][:], encoded[N_LOST][:]
        warn_of_rows(
            argument,
            cut,
            f"are longer than {self._limit} tokens, the limit of `max_length`, the tokenizer or the model, and are "
            "truncated: the tags of the lost words are neither learned nor counted by metrics. Split the rows first.",
        )
        dropped = sum(n for n, is_cut in zip(lost, cut, strict=True) if not is_cut)
        if dropped:
            logger.info(f"{dropped:,} words of `{argument}` have no tokens, so their tags are not counted.")
        if "labels" in encoded.column_names:
            empty = [all(label == IGNORE_INDEX for label in labels) for labels in encoded["labels"]]
            warn_of_rows(argument, empty, "have no word with a tag, so the model learns nothing from them. Drop them.")


def best_tags(logits: Any, labels: Any) -> Any:  # noqa: ARG001
    """Return the number of the best tag of each token, (rows, tokens), from logits (rows, tokens, tags)."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


@dataclass(frozen=True)
class TagMetrics:
    """Precision, recall and F1 of entities, or of tags if they mark no entities, and the accuracy of words.

    They count the first token of each word. For plain tags they are averaged over tags, each counting equally.

    Attributes:
        names: the names of the tags, in the order of their numbers.
    """

    names: tuple[str, ...]

    def __call__(self, evaluated: EvalPrediction) -> dict[str, float]:
        predicted, wanted = np.asarray(evaluated.predictions), np.asarray(evaluated.label_ids)
        counted = wanted != IGNORE_INDEX
        all_predicted, all_wanted = predicted[counted], wanted[counted]
        accuracy = {"accuracy": float(accuracy_score(all_wanted, all_predicted)) if len(all_wanted) else 0.0}
        if mark_entities(self.names):
            named = [
                [[self.names[n] for n in row[places]] for row, places in zip(numbers, counted, strict=True)]
                for numbers in (wanted, predicted)
            ]
            return entity_scores(*named) | accuracy
        scores = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
        how = {"average": "macro", "zero_division": 0.0}
        return {name: float(score(all_wanted, all_predicted, **how)) for name, score in scores.items()} | accuracy
