"""Classes for images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from ..errors import DataError
from .classification import Classification
from .columns import Role, naming
from .task import EncodingOptions


class ImageClassification(Classification):
    """Classes for images. Images are read and resized when they are needed, and stay as they are on disk."""

    roles: ClassVar[Mapping[str, Role]] = {
        "image": Role(("image", "img", "images", "path", "file")),
        "label": Role(("label", "labels", "fine_label")),
    }
    model_class = AutoModelForImageClassification
    processor_class = AutoImageProcessor

    def encode(self, rows: Dataset, argument: str, processor: Any, model: Any, options: EncodingOptions) -> Dataset:
        rows = super().encode(rows, argument, processor, model, options)
        if isinstance(rows.features["image"], Value) and rows.features["image"].dtype == "string":
            rows = rows.cast_column("image", ImageFeature())
        if not isinstance(rows.features["image"], ImageFeature):
            raise DataError(
                f"Column 'image' of `{argument}` holds {rows.features['image']}, but must hold images or the paths of "
                f"image files. Name the column: {naming('image')}."
            )
        columns = ["image", *([] if "label" not in rows.column_names else ["label"])]
        return rows.select_columns(columns).with_transform(_Pixels(processor))


@dataclass(frozen=True)
class _Pixels:
    """Turns images into the pixels that a model takes."""

    processor: Any

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Return the columns `pixel_values` and, if there are labels, `labels`."""
        images = [in_colors(image) for image in batch["image"]]
        pixels = {"pixel_values": list(self.processor(images, return_tensors="pt")["pixel_values"])}
        return pixels | ({"labels": batch["label"]} if "label" in batch else {})


def in_colors(image: Any) -> Any:
    """Return an image of PIL with three channels of 8 bits.

    Raises:
        DataError: if its numbers have no known range, so that PIL would cut them off at 255.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        low, high = image.getextrema()
        if low < 0 or high > 255 or image.mode == "F":
            raise DataError(
                f"An image has numbers from {low:g} to {high:g} (mode {image.mode!r} of PIL), so it is unknown which "
                "of them is white. Save it with 8 bits for each pixel."
            )
    return image.convert("RGB")
