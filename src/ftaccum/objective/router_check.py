"""Find out before training whether a model's balance of experts can be computed over a window."""

from collections.abc import Mapping

import torch
from torch import nn

from ..runtime.module_attributes import preserve_attributes
from ..runtime.process_group import of_main_process
from ..runtime.state_guards import inspection_mode, training_mode
from .batch_changes import fresh_batch
from .forward import Forward
from .item_counts import Batch
from .router_balance import RouterBalance
from .router_terms import RouterTerms
from .sample import UNEQUAL, Sample


def find_router_terms(model: nn.Module, forward: Forward, sample: Sample) -> RouterTerms | None:
    """Return the balance of experts that a model adds to its own loss, if recomputing it gives the model's own number.

    Try it on a few rows in train mode: in one batch, in separate ones, and with other padding. All processes use the
    main process's finding.

    Args:
        forward: the forward pass with the model's own loss, split into its terms.
    """
    device = next(model.parameters()).device
    with inspection_mode(model, *forward.modules), training_mode(model, training=True):
        return _terms(of_main_process(_find(model, forward, sample, device)), device)


def _terms(balance: RouterBalance | None, device: torch.device) -> RouterTerms | None:
    return None if balance is None else RouterTerms(balance, device)


def _find(model: nn.Module, forward: Forward, sample: Sample, device: torch.device) -> RouterBalance | None:
    others = [*sample.separate(sample.together, UNEQUAL), *(sample.collated(UNEQUAL) if sample.collated else [])]

    def explains(balance: RouterBalance, batch: Batch) -> bool:
        given = fresh_batch(batch, device)
        with preserve_attributes(model, *forward.modules):
            return balance.explains(forward.outputs(model, given), given)

    for name, factor in forward.factors.items():
        given = fresh_batch(sample.together, device)
        if not isinstance(given, Mapping):
            return None
        with preserve_attributes(model, *forward.modules):
            outputs = forward.outputs(model, given)
        balance = RouterBalance.find(model, outputs, given, name, factor)
        if balance is not None and all(explains(balance, batch) for batch in others):
            return balance
    return None
