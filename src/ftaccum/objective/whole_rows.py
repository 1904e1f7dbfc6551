"""A check of a count on whole rows, after cut ones have shown that it is right."""

import hashlib
import math

import torch
from torch import nn

from ..runtime.module_attributes import preserve_attributes
from ..runtime.process_group import of_main_process
from ..runtime.state_guards import inspection_mode
from .batch_changes import fresh_batch_for
from .item_counts import Batch, tensors_of
from .objective import Objective
from .perturbation import float32_weights, perturb_head
from .probe import EXPLAINED, difference
from .sample import Sample
from .self_check_cache import VerdictCache


def explains_whole_rows(model: nn.Module, objective: Objective, whole: Sample, cache: VerdictCache | None) -> bool:
    """Return whether the count explains the loss of the four whole rows from batches that are padded on their own.

    A model may compute long rows in another way than short ones, with rotary embeddings of another scale or sparse
    attention. All processes use the main process's finding.

    Args:
        objective: an objective of one term.
        cache: where to keep that it does. An earlier run with the same count, code and config need not be repeated on
            the very same rows.
    """
    rows = _hash_of(whole.together)
    verdict = None if cache is None else cache.find()
    known = verdict is not None and verdict.whole == rows and [verdict.way] == list(objective.report.ways.values())
    if of_main_process(known):
        return True
    explains = _explains(model, objective, whole)
    if explains and cache is not None:
        cache.add_whole(rows)
    return explains


def _hash_of(batch: Batch) -> str:
    found = hashlib.sha256()
    for t in tensors_of(batch):
        found.update(f"{tuple(t.shape)} {t.dtype}".encode())
        found.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _explains(model: nn.Module, objective: Objective, whole: Sample) -> bool:
    ((term, count),) = objective.count_by_term.items()
    modules, parts = objective.modules, whole.parts
    with inspection_mode(model, *modules), float32_weights(model, *modules) as widened, perturb_head(model):

        def losses(batch: Batch) -> dict[str, float]:
            with preserve_attributes(model, *modules):
                means, _ = objective.forward(model, widened(fresh_batch_for(model, batch)))
            return {term: mean.item() for term, mean in means.items()}

        joint, means = losses(whole.together), [losses(part) for part in parts]
    is_finite = all(math.isfinite(each.get(term, math.nan)) for each in (joint, *means))
    return of_main_process(is_finite and difference(joint, means, parts, term, count) <= EXPLAINED)
