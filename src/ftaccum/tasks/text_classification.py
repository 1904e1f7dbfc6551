"""Classes or numbers for texts, or for pairs of texts."""

from collections.abc import Mapping
from typing import ClassVar

from transformers import AutoModelForSequenceClassification

from .classification import Classification
from .columns import Role


class TextClassification(Classification):
    """Classes or numbers for texts, or for pairs of texts if `text_columns` names two."""

    roles: ClassVar[Mapping[str, Role]] = {"label": Role(("label", "labels"))}
    reads_text = True
    model_class = AutoModelForSequenceClassification
