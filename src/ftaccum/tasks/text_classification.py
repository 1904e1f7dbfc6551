"""Classes of texts, or of pairs of texts."""

from collections.abc import Mapping
from typing import Any, ClassVar

from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from ..metrics import ClassificationMetrics
from .class_names import class_names
from .columns import Role
from .task import Task


class TextClassification(Task):
    """Classes of texts, or of pairs of texts if `text_columns` names two."""

    roles: ClassVar[Mapping[str, Role]] = {"label": Role(("label", "labels"))}
    reads_text = True
    model_class = AutoModelForSequenceClassification
    metrics = ClassificationMetrics.NAMES

    def head(self, train: Dataset) -> dict[str, Any]:
        classes = class_names(train)
        return {
            "id2label": dict(enumerate(classes)),
            "label2id": {name: n for n, name in enumerate(classes)},
            "ignore_mismatched_sizes": True,  # a new head for other classes, which is logged
        }

    def evaluation_arguments(self, processor: Any, model: Any) -> dict[str, Any]:  # noqa: ARG002
        return {"compute_metrics": ClassificationMetrics()}
