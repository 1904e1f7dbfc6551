"""Handwritten digits of 8 × 8 pixels, CC BY 4.0 (E. Alpaydin and C. Kaynak, UCI repository, 1998).

They come with scikit-learn, whose code is BSD-3-Clause.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .files import CACHE, complete_path

DIGITS_TRAIN, DIGITS_VAL = CACHE / "digits_train", CACHE / "digits_val"
PATHS = (DIGITS_TRAIN, DIGITS_VAL)

_HELD_OUT = 360
_WHITE = 16  # the greatest value of a pixel


def prepare() -> None:
    """Prepare the digits as PNG files, in a folder for each digit. The same 360 images are always held out.

    The data do not tell who wrote a digit, so the same people may have written digits of both parts.
    """
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    order = random.Random(0).sample(range(len(images)), len(images))
    for folder, rows in ((DIGITS_VAL, order[:_HELD_OUT]), (DIGITS_TRAIN, order[_HELD_OUT:])):
        with complete_path(folder) as half_done:
            for n in rows:
                save_png(half_done / str(digits[n]) / f"{n:04}.png", images[n])


def save_png(file: Path, pixels: Sequence[Any]) -> None:
    """Save the 64 values of an image, from 0 to 16, as a gray image."""
    import numpy as np
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.reshape(pixels, (8, 8)) * (255 / _WHITE)).astype("uint8")).save(file)
