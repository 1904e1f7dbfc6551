"""The objective: from a model and a micro-batch to mean losses and loss items. It alone owns the denominator."""

from .counting import IGNORE_INDEX, Batch, Counting, CountItems, targets_of, tensors_of
from .denominator import Counts, Denominator, ItemMeans, Means, gathered
from .findings import Findings
from .forward import Forward, LossFn, accepted_arguments, is_label, logits_of
from .measuring import Sample, difference_of_packing, measured_objective
from .objective import Objective
from .probing import EXPLAINED

__all__ = [
    "EXPLAINED",
    "IGNORE_INDEX",
    "Batch",
    "CountItems",
    "Counting",
    "Counts",
    "Denominator",
    "Findings",
    "Forward",
    "ItemMeans",
    "LossFn",
    "Means",
    "Objective",
    "Sample",
    "accepted_arguments",
    "difference_of_packing",
    "gathered",
    "is_label",
    "logits_of",
    "measured_objective",
    "targets_of",
    "tensors_of",
]
