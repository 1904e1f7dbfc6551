"""The balance of a mixture of experts over a window, as a term of which each micro-batch adds a part."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..runtime.process_group import ProcessGroup
from ..runtime.tensor_collectives import sum_over_processes
from .item_counts import Batch
from .normalizer import Means
from .router_balance import RouterBalance, RouterTotals
from .window_terms import FirstPass, SettledTerms, Values, WindowPart, WindowTerms


class RouterTerms(WindowTerms):
    """The balance of a model's experts over all tokens of a window."""

    def __init__(self, balance: RouterBalance, device: torch.device) -> None:
        self.names = (balance.name,)
        self._balance, self._device = balance, device

    def read(self, outputs: Any, batch: Batch) -> Values:
        return vars(self._balance.totals(outputs, batch))

    def settle(self, passes: Sequence[FirstPass], process_group: ProcessGroup) -> "SettledBalance":
        total = RouterTotals.of_no_tokens(self._balance.reading.n_experts, self._device)
        for each in passes:
            total = total + RouterTotals(**each.values)
        window = RouterTotals.from_stacked(sum_over_processes(total.stacked(), process_group))
        return SettledBalance(self._balance, window, {self._balance.name: self._balance.part(window, window)})


@dataclass(frozen=True)
class SettledBalance(SettledTerms):
    """The balance of one window.

    Attributes:
        window: the numbers that the balance reads, over all tokens of the window.
    """

    balance: RouterBalance
    window: RouterTotals
    means: Means

    def part(self, index: int, values: Values) -> WindowPart:  # noqa: ARG002
        part = self.balance.part(RouterTotals(**values), self.window)
        return WindowPart(part, part)
