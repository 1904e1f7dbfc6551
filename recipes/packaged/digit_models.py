"""A teacher and a student for the packaged digits (see `digits`). No package has a pretrained model of small images."""

from typing import Any

from . import digits
from .digits import DIGITS_TRAIN
from .files import CACHE, complete_path, prepare_missing, say
from .small_vit import image_processor, new_vit

DIGIT_TEACHER, TINY_VIT = CACHE / "digit-teacher", CACHE / "tiny-vit"
PATHS = (DIGIT_TEACHER, TINY_VIT)

_EPOCHS, _ROWS, _RATE = 16, 64, 6e-3


def prepare() -> None:
    """Prepare a convolutional network that is trained on the digits, and a vision transformer with new weights."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    prepare_missing(digits)
    say("Preparing a teacher for the digits (once): half a minute of training …")
    sizes = {"patch_size": 1, "num_stages": 2, "hidden_sizes": [32, 64], "depths": [1, 1], "initializer_range": 0.05}
    student = new_vit(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    teacher = ConvNextForImageClassification(ConvNextConfig(**sizes, id2label={n: str(n) for n in range(10)}))
    for model, folder in ((student, TINY_VIT), (_trained(teacher), DIGIT_TEACHER)):
        with complete_path(folder) as half_done:
            model.save_pretrained(half_done)
            image_processor().save_pretrained(half_done)


def _trained(model: Any) -> Any:
    """Return the model, trained in plain PyTorch."""
    import torch
    from PIL import Image

    files = sorted(DIGITS_TRAIN.glob("*/*.png"))
    images = [Image.open(file).convert("RGB") for file in files]
    pixels = image_processor()(images, return_tensors="pt")["pixel_values"]
    labels = torch.tensor([int(file.parent.name) for file in files])
    optimizer = torch.optim.AdamW(model.parameters(), _RATE)
    n_updates = _EPOCHS * -(-len(files) // _ROWS)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=n_updates)
    for _ in range(_EPOCHS):
        for rows in torch.randperm(len(files)).split(_ROWS):
            optimizer.zero_grad()
            model(pixel_values=pixels[rows], labels=labels[rows]).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()
