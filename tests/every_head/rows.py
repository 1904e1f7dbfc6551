"""Random ragged rows of every kind. The model's configuration gives, for example, the size of its images.

Each function draws one row. If the models of a task take different rows, there is a function for each kind.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from transformers import PreTrainedConfig

from heads import IGNORED, Row

from .tiny import EOS, FIRST_WORD, VOCABULARY

CLASSES, IMAGE, FRAMES = 3, 64, 2
Draw = Callable[[Generator, Any], Row]

_BINS = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "feature_size", "input_dim")


def next_token(draw: Generator, model: Any) -> Row:
    ids = _ids(draw)
    prompt = _number(draw, len(ids) - 1)  # 0: the first label counts, which only a head that shifts ignores
    return {**_text_row(draw, model, ids), "labels": [IGNORED] * prompt + ids[prompt:]}


def masked(draw: Generator, model: Any) -> Row:
    ids = _ids(draw)
    hidden = _number(draw, len(ids))
    labels = [t if n == hidden or n % 3 == 0 else IGNORED for n, t in enumerate(ids)]
    return {**_text_row(draw, model, ids), "labels": labels}


def text(draw: Generator, model: Any) -> Row:
    return _text_row(draw, model, [*_ids(draw), EOS])  # some heads read the last end-of-sequence


def choices(draw: Generator, model: Any) -> Row:  # noqa: ARG001
    first = _ids(draw)
    return {"input_ids": [first, first[::-1], [FIRST_WORD] * len(first)], "labels": _number(draw, 3)}


def span(draw: Generator, model: Any) -> Row:
    ids = _ids(draw)
    start = _number(draw, len(ids))
    row = _text_row(draw, model, ids)
    return {**row, "start_positions": start, "end_positions": start + _number(draw, len(ids) - start)}


def label_per_token(draw: Generator, model: Any) -> Row:
    ids = _ids(draw)
    labels = [_number(draw, CLASSES) if n % 4 else IGNORED for n in range(1, len(ids) + 1)]
    return {**_text_row(draw, model, ids), "labels": labels}


def sequence_pair(draw: Generator, model: Any) -> Row:
    return {**_text_row(draw, model, _ids(draw)), "labels": _ids(draw, 8)}


def image(draw: Generator, model: Any) -> Row:
    channels = anywhere(model.config, "num_channels") or 3
    size = anywhere(model.config, "image_size") or IMAGE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return {"pixel_values": _floats(draw, channels, height, width)}


def video(draw: Generator, model: Any) -> Row:
    frames = anywhere(model.config, "num_frames") or anywhere(model.config, "frames_per_clip") or FRAMES
    return {model.main_input_name: _floats(draw, frames, *image(draw, model)["pixel_values"].shape)}


def labelled_pixels(draw: Generator, model: Any) -> Row:
    """Return an image with a label for each pixel. The share of ignored labels differs from row to row."""
    row = image(draw, model)
    labels = torch.randint(CLASSES, row["pixel_values"].shape[1:], generator=draw)
    share = 0.1 + 0.6 * torch.rand((), generator=draw)
    labels[torch.rand(labels.shape, generator=draw) < share] = getattr(model.config, "semantic_loss_ignore_index", 255)
    return {**row, "labels": labels}


def wave(draw: Generator, model: Any) -> Row:
    length = 1600 + _number(draw, 800)
    return {"input_values": _floats(draw, length), **_mask(model, length)}


def frames_of_bins(draw: Generator, model: Any) -> Row:
    """Return the features of a sound, with the number of frames that the model needs, else a random one."""
    frames = anywhere(model.config, "max_length") if model.main_input_name == "input_values" else None
    frames = frames or 24 + _number(draw, 24)
    return {model.main_input_name: _floats(draw, frames, _bins(model)), **_mask(model, frames)}


def bins_of_frames(draw: Generator, model: Any) -> Row:
    frames = 2 * (anywhere(model.config, "max_source_positions") or 20)
    return {model.main_input_name: _floats(draw, _bins(model), frames)}


def labelled(kind: str, *draws: Draw) -> tuple[Draw, ...]:
    """Return functions that draw the same rows with labels for the whole row."""
    label: Callable[[Generator], Any] = {
        "class": lambda draw: _number(draw, CLASSES),
        "yes or no": lambda draw: _number(draw, 2),
        "value": _floats,
        "classes": lambda draw: torch.rand(CLASSES, generator=draw).round().double(),
        "words": lambda draw: _ids(draw, 5),
    }[kind]

    def with_label(each: Draw) -> Draw:
        return lambda draw, model: {**each(draw, model), "labels": label(draw)}

    return tuple(map(with_label, draws))


def anywhere(config: PreTrainedConfig, name: str) -> Any:
    """Return a configuration's attribute, or that of the first nested configuration that has it."""
    found = getattr(config, name, None)
    inner = (value for value in vars(config).values() if isinstance(value, PreTrainedConfig))
    return found if found is not None else next((f for c in inner if (f := anywhere(c, name)) is not None), None)


def accepted(model: nn.Module) -> set[str]:
    """Return the arguments that a model's `forward` names."""
    return set(inspect.signature(model.forward).parameters)


def _text_row(draw: Generator, model: Any, ids: list[int]) -> Row:
    boxes = {"bbox": torch.randint(30, (len(ids), 2), generator=draw).repeat(1, 2).cumsum(1)}
    return {"input_ids": ids, **(boxes if "bbox" in accepted(model) else {})}


def _mask(model: nn.Module, length: int) -> Row:
    return {"attention_mask": [1] * length} if "attention_mask" in accepted(model) else {}


def _bins(model: Any) -> int:
    return next((bins for name in _BINS if (bins := anywhere(model.config, name)) is not None), 16)


def _ids(draw: Generator, longest: int = 12) -> list[int]:
    return torch.randint(FIRST_WORD, VOCABULARY, (3 + _number(draw, longest - 2),), generator=draw).tolist()


def _number(draw: Generator, below: int) -> int:
    return int(torch.randint(below, (1,), generator=draw))


def _floats(draw: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw, dtype=torch.float64)
