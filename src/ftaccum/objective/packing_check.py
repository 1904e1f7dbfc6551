"""A check that the packed rows of a batch do not attend to each other."""

from torch import nn

from ..runtime.process_group import of_main_process
from ..runtime.state_guards import inspection_mode
from .batch_changes import fresh_batch_for
from .item_counts import Batch
from .objective import Objective
from .perturbation import float32_weights, perturb_head


def difference_of_packing(model: nn.Module, objective: Objective, padded: Batch, packed: Batch) -> float:
    """Return the relative difference between the loss of packed rows and that of the same rows padded.

    It exceeds rounding if packed rows attend to each other. All processes use the main process's result.
    """

    def loss(batch: Batch) -> float:
        counts = objective.count(batch)
        means, _ = objective.forward(model, fresh_batch_for(model, batch))
        return sum(float(mean) * counts[term] for term, mean in means.items())

    with inspection_mode(model, *objective.forward.modules), float32_weights(model), perturb_head(model):
        off = abs(loss(packed) / loss(padded) - 1)
    return of_main_process(off)
