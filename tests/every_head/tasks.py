"""The tasks: their classes in Transformers, and the kinds of rows to train them on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING, modeling_auto

from heads import N_ROWS, Row

from . import rows
from .rows import CLASSES, Draw


@dataclass(frozen=True)
class Variant:
    """One way to train the classes of a task.

    Attributes:
        draws: functions that draw a row. The first whose rows the model can run on is used.
        settings: arguments of the configuration.
        switches: settings that only some configurations have, at any depth. The variant is only for those.
    """

    draws: Sequence[Draw]
    settings: dict[str, Any] = field(default_factory=dict)
    switches: dict[str, Any] = field(default_factory=dict)

    def rows_for(self, model: nn.Module) -> Iterator[list[Row]]:
        for draw_row in self.draws:
            draw = torch.Generator().manual_seed(7)
            yield [draw_row(draw, model) for _ in range(N_ROWS)]


@dataclass(frozen=True)
class Case:
    """A class to check, in one variant."""

    task: str
    config_class: type[PreTrainedConfig]
    model_class: type[nn.Module]
    variant: str = ""

    @property
    def how(self) -> Variant:
        return TASKS[self.task][self.variant]

    def __str__(self) -> str:
        return f"{self.model_class.__name__}{f' ({self.variant})' if self.variant else ''}"


_SOUND = (rows.wave, rows.frames_of_bins, rows.bins_of_frames)
_SOME_CLASSES = {"num_labels": CLASSES}
_ROUTER_LOSS = {"output_router_logits": True}


def _classification(draw_row: Draw) -> dict[str, Variant]:
    def problem(name: str, n_labels: int = CLASSES) -> dict[str, Any]:
        return {"num_labels": n_labels, "problem_type": name}

    return {
        "": Variant(rows.labelled("class", draw_row), problem("single_label_classification")),
        "regression": Variant(rows.labelled("value", draw_row), problem("regression", 1)),
        "multi-label": Variant(rows.labelled("classes", draw_row), problem("multi_label_classification")),
    }


def _with_experts(*draws: Draw) -> dict[str, Variant]:
    return {"": Variant(draws), "router loss": Variant(draws, switches=_ROUTER_LOSS)}


TASKS: dict[str, dict[str, Variant]] = {
    "CAUSAL_LM": _with_experts(rows.next_token),
    "MASKED_LM": {"": Variant([rows.masked])},
    "SEQ_TO_SEQ_CAUSAL_LM": _with_experts(rows.sequence_pair, rows.next_token),
    "SEQUENCE_CLASSIFICATION": _classification(rows.text),
    "TOKEN_CLASSIFICATION": {"": Variant([rows.label_per_token], _SOME_CLASSES)},
    "MULTIPLE_CHOICE": {"": Variant([rows.choices])},
    "QUESTION_ANSWERING": {"": Variant([rows.span])},
    "NEXT_SENTENCE_PREDICTION": {"": Variant(rows.labelled("yes or no", rows.text))},
    "IMAGE_CLASSIFICATION": _classification(rows.image),
    "VIDEO_CLASSIFICATION": {"": Variant(rows.labelled("class", rows.video), _SOME_CLASSES)},
    "SEMANTIC_SEGMENTATION": {"": Variant([rows.labelled_pixels], _SOME_CLASSES)},
    "AUDIO_CLASSIFICATION": {"": Variant(rows.labelled("class", *_SOUND), _SOME_CLASSES)},
    "CTC": {
        "sum": Variant(rows.labelled("words", *_SOUND), {"ctc_loss_reduction": "sum"}),
        "mean": Variant(rows.labelled("words", *_SOUND), {"ctc_loss_reduction": "mean"}),
    },
    "SPEECH_SEQ_2_SEQ": {"": Variant(rows.labelled("words", *_SOUND))},
    "IMAGE_TEXT_TO_TEXT": _with_experts(rows.next_token),  # with rows of text only
}


def cases(task: str, name: str = "") -> Iterator[Case]:
    """Yield every class in Transformers' mapping for a task, in all its variants.

    Args:
        name: a part of the class names, to select some.
    """
    mapping = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING")
    names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
    config_of: dict[type[nn.Module], type[PreTrainedConfig]] = {}
    for model_type in names:
        if name not in str(names[model_type]):
            continue  # skip the import of its module
        config_class = CONFIG_MAPPING[model_type]
        found = mapping[config_class]
        for model_class in found if isinstance(found, tuple) else (found,):
            if model_class not in config_of or model_class.config_class is config_class:
                config_of[model_class] = config_class
    for model_class, config_class in config_of.items():
        if name in model_class.__name__:
            for variant, how in TASKS[task].items():
                if all(_has(config_class, switch) for switch in how.switches):
                    yield Case(task, config_class, model_class, variant)


def _has(config_class: type[PreTrainedConfig], switch: str) -> bool:
    try:
        return rows.anywhere(config_class(), switch) is not None
    except Exception:  # a configuration without defaults has no switches
        return False
