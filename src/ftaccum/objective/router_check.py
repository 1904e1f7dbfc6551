"""Find out before training whether a model's balance of experts can be computed over a window."""

from collections.abc import Mapping
from typing import Any

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
    """Return the balances of experts that a model adds to its own loss, if recomputing them gives its own numbers.

    Try it on a few rows in train mode: in one batch, in separate ones, and with other padding. All processes use the
    main process's finding.

    Args:
        forward: the forward pass with the model's own loss, split into its terms.
    """
    device = next(model.parameters()).device
    with inspection_mode(model, *forward.modules), training_mode(model, training=True):
        balances = of_main_process(_balances(model, forward, sample, device))
    return RouterTerms(balances, device) if balances else None


def _balances(model: nn.Module, forward: Forward, sample: Sample, device: torch.device) -> list[RouterBalance]:
    if not isinstance(sample.together, Mapping):
        return []
    others = [*sample.separate(sample.together, UNEQUAL), *(sample.collated(UNEQUAL) if sample.collated else [])]
    together, *runs = [_run(model, forward, batch, device) for batch in (sample.together, *others)]
    tried = [RouterBalance.find(model, *together, name, factor) for name, factor in forward.factors.items()]
    return [balance for balance in tried if balance is not None and all(balance.explains(*run) for run in runs)]


def _run(model: nn.Module, forward: Forward, batch: Batch, device: torch.device) -> tuple[Any, Batch]:
    """Return the outputs of a batch, and the batch as the model saw it."""
    given = fresh_batch(batch, device)
    with preserve_attributes(model, *forward.modules):
        return forward.outputs(model, given), given
