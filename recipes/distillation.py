"""Distil an image classifier: train a small student on the labels and on the probabilities of a larger teacher.

    python recipes/distillation.py --config recipes/distillation.yaml      # packaged teacher, student and digits
    python recipes/distillation.py --teacher nateraw/vit-base-beans --model facebook/deit-tiny-patch16-224 \\
        --train_data AI-Lab-Makerere/beans --batch_size 32 --effective_batch_size 128
    python recipes/distillation.py --teacher outputs/mine/model --model small-vit --train_data images/
    accelerate launch --config_file recipes/two_cpu_processes.yaml recipes/distillation.py \\
        --config recipes/distillation.yaml

With the logits z of the student and t of the teacher, a temperature T and a weight a, the loss is the mean over rows of

    a · T² · KL(softmax(t / T) ‖ softmax(z / T)) + (1 − a) · cross entropy(z, label)

(Hinton et al., "Distilling the knowledge in a neural network", 2015, arXiv:1503.02531). T² keeps the gradient of the
first part about as large at any temperature. `--weight 0` trains the same student without the teacher.

It takes any two models that `AutoModelForImageClassification` loads, with the same classes in the same order and the
same image processor, and files, folders or Hub data sets with an image and a label. The teacher is frozen. The student
in OUTPUT_DIR/model loads with `pipeline("image-classification", model=...)`.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor
from transformers import AutoModelForImageClassification

import ftaccum
import packaged


@dataclass
class Options:
    """The teacher and the loss."""

    teacher: str = field(default=str(packaged.DIGIT_TEACHER), metadata={"help": "folder or hub name of the teacher"})
    temperature: float = field(default=2.0, metadata={"help": "divides the logits of both models"})
    weight: float = field(default=0.9, metadata={"help": "weight of the teacher's part of the loss, from 0 to 1"})

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"`temperature` must be a number above 0, but is {self.temperature} instead.")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"`weight` must be from 0 to 1, but is {self.weight} instead.")


class Distillation(ftaccum.ModelWrapper):
    """A student and its frozen teacher, which a `ModelWrapper` keeps in eval mode.

    Suffixes of shapes: N rows, C classes.
    """

    def __init__(self, student: Any, teacher: Any, temperature: float, weight: float) -> None:
        super().__init__(student)
        self.teacher = teacher.requires_grad_(False)
        self.temperature, self.weight = temperature, weight

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the loss, and the logits of the student."""
        logits_NC = self.model(pixel_values=pixel_values).logits
        with torch.no_grad():
            wanted_NC = F.softmax(self.teacher(pixel_values=pixel_values).logits / self.temperature, dim=-1)
        found_NC = F.log_softmax(logits_NC / self.temperature, dim=-1)
        divergence = self.temperature**2 * F.kl_div(found_NC, wanted_NC, reduction="batchmean")
        loss = self.weight * divergence + (1 - self.weight) * F.cross_entropy(logits_NC, labels)
        return {"loss": loss, "logits": logits_NC}


def load_teacher(name: str) -> Any:
    """Return an image classifier.

    Raises:
        SettingsError: if it cannot be loaded.
    """
    try:
        return AutoModelForImageClassification.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ftaccum.SettingsError(
            [f"`teacher` {name!r} cannot be loaded: {error} Give a folder or a hub name."]
        ) from error


def main(options: ftaccum.ScriptOptions) -> ftaccum.Result:
    extra: Options = options.extra
    packaged.prepare(extra.teacher, *options.data.values())
    teacher = load_teacher(extra.teacher)
    loaded = ftaccum.load_task(**options.data)
    if teacher.config.id2label != loaded.model.config.id2label:
        theirs, ours = (list(config.id2label.values()) for config in (teacher.config, loaded.model.config))
        raise ftaccum.DataError(
            f"The teacher has the classes {theirs}, but `train_data` has {ours}. Choose another teacher."
        )
    arguments = loaded.arguments()
    arguments["model"] = Distillation(arguments["model"], teacher, extra.temperature, extra.weight)
    result = ftaccum.test_fine_tuning(**arguments, **options.settings)
    if result.metrics:
        PartialState().print(f"Held-out accuracy of the student: {result.metrics[-1]['accuracy']:.1%}")
    return result


if __name__ == "__main__":
    ftaccum.run_script(
        main,
        __doc__,
        task="image-classification",
        extra=Options,
        model=packaged.TINY_VIT,
        train_data=packaged.DIGITS_TRAIN,
        val_data=packaged.DIGITS_VAL,
    )
