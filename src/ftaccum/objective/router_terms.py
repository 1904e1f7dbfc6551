"""The balances of a mixture of experts over a window. Each micro-batch adds a part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..runtime.process_group import ProcessGroup
from ..runtime.tensor_collectives import sum_over_processes
from .item_counts import Batch
from .normalizer import Means
from .router_balance import RouterBalance, RouterTotals
from .window_terms import CollectedValues, ComputedTerms, Values, WindowPart, WindowTerms


class RouterTerms(WindowTerms):
    """The balances of a model's experts over all tokens of a window: one, or several in an encoder-decoder.

    Attributes:
        padding: the share of padding in the tokens that they read; 0 if padding does not count.
    """

    def __init__(self, balances: Sequence[RouterBalance], device: torch.device, padding: float = 0.0) -> None:
        self.padding = padding
        self.names = tuple(balance.name for balance in balances)
        self._balances, self._device = balances, device

    def read(self, outputs: Any, batch: Batch) -> Values:
        return {
            f"{balance.name}.{name}": value
            for balance in self._balances
            if outputs.get(balance.name) is not None  # some models leave it out in eval mode
            for name, value in vars(balance.totals(outputs, batch)).items()
        }

    def compared(self, values: Values) -> Values:
        # Not the choices: on a GPU, rounding can decide which of two experts a token chooses.
        return {name: value for name, value in values.items() if name.endswith(".probabilities_E")}

    def compute(
        self,
        passes: Sequence[CollectedValues],
        process_group: ProcessGroup,
        seed: Sequence[int],  # noqa: ARG002
    ) -> "ComputedBalances":
        windows = {}
        for balance in self._balances:
            total = RouterTotals.of_no_tokens(balance.reading.n_experts, self._device)
            for each in passes:
                if own := _named(balance, each.values):
                    total = total + RouterTotals(**own)
            windows[balance.name] = RouterTotals.from_stacked(sum_over_processes(total.stacked(), process_group))
        means = {balance.name: balance.part(windows[balance.name], windows[balance.name]) for balance in self._balances}
        return ComputedBalances(self._balances, windows, means)


@dataclass(frozen=True)
class ComputedBalances(ComputedTerms):
    """The balances of one window.

    Attributes:
        windows: the numbers that each balance reads, over all tokens of the window, by its name.
    """

    balances: Sequence[RouterBalance]
    windows: Mapping[str, RouterTotals]
    means: Means

    def part(self, index: int, values: Values) -> WindowPart:  # noqa: ARG002
        parts = [balance.part(_totals(balance, values), self.windows[balance.name]) for balance in self.balances]
        total = torch.stack(parts).sum()
        return WindowPart(total, total)

    def zero(self, values: Values) -> Tensor:
        probabilities = [_totals(balance, values).probabilities_E for balance in self.balances]
        return torch.stack([each.sum() * 0 for each in probabilities]).sum()


def _totals(balance: RouterBalance, values: Values) -> RouterTotals:
    own = _named(balance, values)
    if not own:
        raise DataError(
            f"The model no longer returns `{balance.name}`, which its loss had before training. Leave "
            "`config.output_router_logits` as it is until the run ends, or set it before the run."
        )
    return RouterTotals(**own)


def _named(balance: RouterBalance, values: Values) -> dict[str, Tensor]:
    """Return the values of one balance, by the names that its totals have."""
    prefix = f"{balance.name}."
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
