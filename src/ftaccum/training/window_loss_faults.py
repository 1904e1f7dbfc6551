"""Faults in the arguments of a loss over the window, found before anything is loaded."""

from typing import TYPE_CHECKING

from torch import nn

from ..settings.recipe import Recipe
from ..settings.runtime import Runtime

if TYPE_CHECKING:
    from .config import Components


def faults_of_window_loss(components: "Components", recipe: Recipe, runtime: Runtime) -> list[str]:
    """Return a sentence for each argument that contradicts `loss_over`."""
    if recipe.loss_over != "window":
        if components.loss_inputs is None:
            return []
        return [
            "`loss_inputs` is given, but `loss_over` is 'items', with which `loss_fn` gets the outputs themselves. Set "
            "`loss_over='window'` for a loss that reads all rows of an update together, or leave `loss_inputs` out."
        ]
    inputs = components.loss_inputs
    trains = isinstance(inputs, nn.Module) and any(p.requires_grad for p in inputs.parameters())
    contradictions = {
        "`loss_over` is 'window', but `loss_fn` is None. Give the loss: `loss_fn(inputs, batch)` gets what "
        "`loss_inputs` returns for all rows of an update. `ftaccum.losses` has ready-made ones. The command line takes "
        "none: start from the script `recipes/embeddings.py`.": (components.loss_fn is None),
        "`reduction` is 'sum', but with `loss_over='window'` the loss is one number per update, which nothing divides. "
        "Leave `reduction` out.": components.reduction == "sum",
        "`count_items` is given, but with `loss_over='window'` no items are counted: the loss is one number per "
        "update. Leave it out.": components.count_items is not None,
        "`loss_inputs` is a module with trainable parameters, which no optimizer would hold. Make it a part of the "
        "model, and let `forward` return what it computes.": trains,
        "`padding_free` is True, but with `loss_over='window'` each row must stay a row of its batch. Leave it "
        "out.": runtime.padding_free,
    }
    return [sentence for sentence, holds in contradictions.items() if holds]
