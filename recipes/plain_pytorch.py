"""Train a module of plain PyTorch on tensors, with a loss function: no Transformers model, no tokenizer, no hub.

    python recipes/plain_pytorch.py --config recipes/plain_pytorch.yaml      # scikit-learn's digits
    python recipes/plain_pytorch.py --train_data images.pt --batch_size 64 --effective_batch_size 4096
    accelerate launch --config_file recipes/two_cpu_processes.yaml recipes/plain_pytorch.py \\
        --config recipes/plain_pytorch.yaml

The rows are pairs of an input and its target, from a `TensorDataset` or any other data set of PyTorch. `loss_fn` gets
the module's outputs and the targets. A file is one that `torch.save((images, labels), file)` wrote, with images of the
shape (rows, channels, height, width) and a class number for each. The saved weights in OUTPUT_DIR/model load with
`safetensors.torch.load_model(DigitNet(...), "OUTPUT_DIR/model/model.safetensors")`.
"""

from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import ftaccum


@dataclass
class Options:
    """The data and the size of the network."""

    train_data: str | None = field(
        default=None, metadata={"help": "file of `torch.save` with images and labels; none: the digits"}
    )
    width: int = field(default=16, metadata={"help": "channels of the first convolution, a multiple of 4"})

    def __post_init__(self) -> None:
        if self.width <= 0 or self.width % 4:
            raise ValueError(f"`width` must be a positive multiple of 4, but is {self.width} instead.")


class DigitNet(nn.Module):
    """A convolutional network for small images. It has no batch norm, which depends on how a batch is split."""

    def __init__(self, n_channels: int = 1, n_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(n_channels, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2), nn.GroupNorm(4, 2 * width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, n_classes),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


def read(file: str | None) -> tuple[Tensor, Tensor]:
    """Return images and their class numbers.

    Raises:
        DataError: if the file cannot be read, or holds something else.
    """
    if file is None:
        images, digits = load_digits(return_X_y=True)
        return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(digits)
    remedy = "Write it with `torch.save((images, labels), file)`."
    try:
        loaded = torch.load(file, weights_only=True)
    except Exception as error:  # whatever the file is, `torch.load` takes it for a pickle
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ftaccum.DataError(f"`train_data` {file!r} cannot be read: {reason}. {remedy}") from error
    is_pair = isinstance(loaded, tuple | list) and len(loaded) == 2 and all(isinstance(x, Tensor) for x in loaded)
    if not is_pair:
        raise ftaccum.DataError(f"`train_data` {file!r} does not have two tensors, images and labels. {remedy}")
    images, labels = loaded
    if images.ndim != 4 or labels.shape != images.shape[:1] or not len(labels) or labels.dtype != torch.int64:
        raise ftaccum.DataError(
            f"`train_data` {file!r} has images of the shape {tuple(images.shape)} and labels of the shape "
            f"{tuple(labels.shape)} and the type {labels.dtype}. Images must have the shape (rows, channels, height, "
            "width), and labels the shape (rows,) and the type torch.int64."
        )
    return images.float(), labels


def main(options: ftaccum.ScriptOptions) -> ftaccum.Result:
    images, labels = read(options.extra.train_data)
    set_seed(options.settings["random_seed"])  # the first weights
    model = DigitNet(images.shape[1], int(labels.max()) + 1, options.extra.width)
    result = ftaccum.test_fine_tuning(
        model,
        train_data=TensorDataset(images, labels),
        loss_fn=nn.CrossEntropyLoss(),
        compute_metrics=ftaccum.Accuracy(),
        **options.settings,
    )
    if result.metrics:
        PartialState().print(f"Held-out accuracy: {result.metrics[-1]['accuracy']:.1%}")
    return result


if __name__ == "__main__":
    ftaccum.run_script(main, __doc__, extra=Options)
