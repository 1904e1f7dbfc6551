"""Find out before training whether a model's balance of experts can be computed over a window."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..runtime.module_attributes import preserve_attributes
from ..runtime.process_group import of_main_process
from ..runtime.state_guards import inspection_mode, training_mode
from .batch_changes import fresh_batch_for
from .forward import Forward
from .item_counts import Batch
from .router_balance import RouterBalance
from .router_terms import RouterTerms
from .sample import Sample


def find_router_terms(model: nn.Module, forward: Forward, sample: Sample) -> RouterTerms | None:
    """Return the balances of experts that a model adds to its own loss, if recomputing them gives its own numbers.

    Try it on a few rows in train mode: in one batch, in separate ones, and with other padding. All processes use the
    main process's finding.

    Args:
        forward: the forward pass with the model's own loss, split into its terms.
    """
    with inspection_mode(model, *forward.modules), training_mode(model, training=True):
        balances, padding = of_main_process(_balances(model, forward, sample))
    return RouterTerms(balances, next(model.parameters()).device, padding) if balances else None


def _balances(model: nn.Module, forward: Forward, sample: Sample) -> tuple[list[RouterBalance], float]:
    """Return the balances, and the share of padding in the tokens that they read of one batch."""
    if not isinstance(sample.together, Mapping):
        return [], 0.0

    def runs_of(batches: Sequence[Batch]) -> list[tuple[Any, Batch]]:
        return [_run(model, forward, batch) for batch in batches]

    (together,) = runs_of([sample.together])
    separate, own_width = runs_of(sample.separate(sample.together)), runs_of(sample.own_width)
    tried = [RouterBalance.find(model, *together, name, factor) for name, factor in forward.factors.items()]
    runs = [*separate, *own_width]
    found = [balance for balance in tried if balance is not None and all(balance.explains(*run) for run in runs)]
    if not own_width:
        return found, 0.0
    return found, max((_share_of_padding(balance, together, own_width) for balance in found), default=0.0)


def _share_of_padding(
    balance: RouterBalance, together: tuple[Any, Batch], own_width: Sequence[tuple[Any, Batch]]
) -> float:
    n_tokens = sum(balance.totals(*run).n_tokens.item() for run in own_width)
    return 1 - n_tokens / balance.totals(*together).n_tokens.item()


def _run(model: nn.Module, forward: Forward, batch: Batch) -> tuple[Any, Batch]:
    """Return the outputs of a batch, and the batch as the model saw it."""
    given = fresh_batch_for(model, batch)
    with preserve_attributes(model, *forward.modules):
        return forward.outputs(model, given), given
