"""A small vision transformer with random weights, for images of 8 × 8 pixels. No package has a pretrained one."""

from .files import CACHE, beside

SMALL_VIT = CACHE / "small-vit"
PATHS = (SMALL_VIT,)


def prepare() -> None:
    """Prepare the configuration, new weights (the same each time) and the image processor for `from_pretrained`."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel, set_seed

    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    half_done = beside(SMALL_VIT)
    set_seed(0)
    ViTModel(ViTConfig(image_size=8, patch_size=2, **sizes, **off), add_pooling_layer=False).save_pretrained(half_done)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(half_done)
    half_done.rename(SMALL_VIT)
