"""A small vision transformer with random weights, for images of 8 × 8 pixels. No package has a pretrained one."""

from typing import Any

from .files import CACHE, complete_path

SMALL_VIT = CACHE / "small-vit"
PATHS = (SMALL_VIT,)

_SIDE = 8  # pixels


def prepare() -> None:
    """Prepare the configuration, new weights (the same each time) and the image processor for `from_pretrained`."""
    model = new_vit(hidden_size=96, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4)
    with complete_path(SMALL_VIT) as half_done:
        model.save_pretrained(half_done)
        image_processor().save_pretrained(half_done)


def new_vit(**sizes: int) -> Any:
    """Return a vision transformer without a head, with patches of 2 × 2 pixels and without dropout."""
    from transformers import ViTConfig, ViTModel, set_seed

    set_seed(0)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTModel(ViTConfig(image_size=_SIDE, patch_size=2, **sizes, **off), add_pooling_layer=False)


def image_processor() -> Any:
    """Return the processor that resizes and normalizes the images."""
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": _SIDE, "width": _SIDE})
