"""The balance of a mixture of experts over all tokens of an update, as a sum of parts of its micro-batches.

Dimensions: N tokens of a layer, E experts.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..errors import DataError
from .normalizer import widened, widest_float

# The model's own number has float32's rounding: 1e-7 in batches of up to 260,000 tokens. Wrong readings can be as close
# as 2e-6: with a balanced router, all are close to k.
_TOLERANCE = 4 * torch.finfo(torch.float32).eps

_TOP_K = re.compile(r"experts?_per_tok|top_?k|moe_k|(selected|active)_experts")

Router = Literal["softmax in float32", "softmax", "probabilities"]
_ROUTERS: tuple[Router, ...] = ("softmax in float32", "softmax", "probabilities")


@dataclass(frozen=True)
class RouterTotals:
    """The numbers that a balance reads of some tokens, summed over these tokens and all layers.

    All are in float64, or float32 on devices without it.

    Attributes:
        choices_E: how many tokens have an expert among their top k; without gradient.
        probabilities_E: the sum of the router's probabilities, with its gradient.
        n_tokens: the number of tokens times layers, a scalar. Masked tokens do not count.
    """

    choices_E: Tensor  # noqa: N815
    probabilities_E: Tensor  # noqa: N815
    n_tokens: Tensor

    def __add__(self, other: "RouterTotals") -> "RouterTotals":
        return RouterTotals(
            self.choices_E + other.choices_E,
            self.probabilities_E + other.probabilities_E,
            self.n_tokens + other.n_tokens,
        )

    def stacked(self) -> Tensor:
        """Return all numbers as one tensor of shape (2E + 1,) without gradient, to sum over processes."""
        return torch.cat([self.choices_E, self.probabilities_E.detach(), self.n_tokens.reshape(1)])

    @classmethod
    def from_stacked(cls, stacked: Tensor) -> "RouterTotals":
        """Return the numbers that `stacked` has put into one tensor."""
        n_experts = (len(stacked) - 1) // 2
        return cls(stacked[:n_experts], stacked[n_experts:-1], stacked[-1])

    @classmethod
    def of_no_tokens(cls, n_experts: int, device: torch.device | str) -> "RouterTotals":
        """Return zeros: the numbers of a process that has no row."""
        zeros = torch.zeros(2 * n_experts + 1, dtype=widest_float(torch.device(device)), device=device)
        return cls.from_stacked(zeros)


@dataclass(frozen=True)
class RouterReading:
    """A way to read the router's probabilities and choices from a model's outputs.

    Attributes:
        output: the name of the output with a tensor per layer, of shape (…, E), such as "router_logits".
        router: how these become probabilities. "softmax" keeps their type; "softmax in float32" widens 16-bit types.
        n_experts: E.
        top_k: how many experts a token chooses.
        mask: the column of the batch that masks tokens, of one number per token. Without this column, all tokens count.
            None if the balance reads masked tokens, too.
    """

    output: str
    router: Router
    n_experts: int
    top_k: int
    mask: str | None

    def totals(self, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> RouterTotals:
        """Return the totals of a batch.

        Raises:
            DataError: if the outputs lack the tensors of the router, or the mask has another number of tokens.
        """
        layers = outputs.get(self.output)
        if not _is_layers(layers) or layers[0].shape[-1] != self.n_experts:
            raise DataError(f"`{self.output}` must be a tensor of {self.n_experts} experts per layer.")
        device = layers[0].device
        mask_N = batch.get(self.mask) if self.mask is not None else None
        if mask_N is not None:
            mask_N = mask_N.reshape(-1).to(device, widest_float(device))
        totals = RouterTotals.of_no_tokens(self.n_experts, device)
        for layer in layers:
            totals = totals + self._layer_totals(layer.reshape(-1, self.n_experts).to(device), mask_N)
        return totals

    def _layer_totals(self, layer_NE: Tensor, mask_N: Tensor | None) -> RouterTotals:
        if mask_N is not None and len(mask_N) != len(layer_NE):
            raise DataError(f"`{self.mask}` has {len(mask_N)} tokens, but `{self.output}` has {len(layer_NE)}.")
        wide = widest_float(layer_NE.device)
        counted_N = torch.ones(len(layer_NE), dtype=wide, device=layer_NE.device) if mask_N is None else mask_N
        probabilities_NE = _probabilities(layer_NE, self.router)
        chosen = probabilities_NE.detach().topk(self.top_k, dim=-1).indices
        # Not `bincount`, which waits for the device.
        choices_E = counted_N.new_zeros(self.n_experts)
        choices_E.scatter_add_(0, chosen.reshape(-1), counted_N.repeat_interleave(self.top_k))
        if mask_N is not None:
            probabilities_NE = probabilities_NE * mask_N.to(probabilities_NE.dtype).unsqueeze(-1)
        return RouterTotals(choices_E, probabilities_NE.sum(0, dtype=wide), counted_N.sum())


@dataclass(frozen=True)
class RouterBalance:
    """The balance of experts that a model adds to its loss, over the tokens of several micro-batches.

    The model computes E · Σ_i T_i R_i / N² from all tokens of one batch. T_i is the number of tokens with expert i in
    their top k, R_i the sum of its probabilities, and N the number of tokens, each summed over layers. T has no
    gradient. Once T and N of all micro-batches are known, each micro-batch adds a part that is linear in its own R.
    The parts add up to the balance of one batch, and so do their gradients.

    Attributes:
        name: the name of the balance among the model's outputs, such as "aux_loss".
        factor: its factor in the model's loss.
        reading: how the balance follows from the outputs.

    References:
        Fedus, Zoph and Shazeer, "Switch Transformers", 2021, equations 4–6, https://arxiv.org/abs/2101.03961.
        Qiu et al., "Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized
        Mixture-of-Expert Models", 2025, https://arxiv.org/abs/2501.11873.
    """

    name: str
    factor: float
    reading: RouterReading

    @classmethod
    def find(
        cls, model: Any, outputs: Any, batch: Mapping[str, Any], name: str, factor: float
    ) -> "RouterBalance | None":
        """Return the balance if recomputing it gives the model's own number within the rounding of float32, else None.

        A batch of several rows with padding distinguishes all readings. If several agree, padding counts as masked.

        Args:
            model: the model, maybe wrapped. Its config gives the number of experts and of those that a token chooses.
            outputs: what the model returned for the batch.
            name: the name of a scalar among the outputs.
            factor: the factor of this scalar in the model's loss. None is returned if it is not finite.
        """
        if not isinstance(outputs, Mapping) or not math.isfinite(factor):
            return None
        found = (cls(name, factor, reading) for reading in _readings(model, outputs, batch))
        return next((balance for balance in found if balance.explains(outputs, batch)), None)

    @torch.no_grad()
    def explains(self, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> bool:
        """Return whether recomputing the balance of a batch gives the model's own number."""
        own = outputs.get(self.name)
        if not isinstance(own, Tensor) or own.ndim > 0 or not own.is_floating_point():
            return False
        try:
            recomputed = self.balance(self.totals(outputs, batch)).item()
        except DataError:
            return False
        return math.isclose(recomputed, own.item(), rel_tol=_TOLERANCE)

    def totals(self, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> RouterTotals:
        """Return the totals of a micro-batch, with the gradient of its router if the outputs have one.

        Raises:
            DataError: if the outputs lack the tensors of the router, or the mask has another number of tokens.
        """
        return self.reading.totals(outputs, batch)

    def part(self, own: RouterTotals, window: RouterTotals) -> Tensor:
        """Return the part of a micro-batch in factor · balance, a scalar.

        Its gradient goes through `own.probabilities_E` only. The balance of no tokens is 0.

        Args:
            own: the totals of the micro-batch.
            window: the totals of all micro-batches of the update, over all processes.
        """
        n = torch.where(window.n_tokens > 0, window.n_tokens, 1)
        shares_E = window.choices_E / n * (self.factor * self.reading.n_experts)
        return (shares_E.detach() * own.probabilities_E / n.detach()).sum()

    def balance(self, totals: RouterTotals) -> Tensor:
        """Return the balance of these tokens without its factor, a scalar: the output that the model names `name`."""
        n = torch.where(totals.n_tokens > 0, totals.n_tokens, 1)
        return (totals.choices_E / n * totals.probabilities_E / n).sum() * self.reading.n_experts


def _readings(model: Any, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> Iterator[RouterReading]:
    """Yield all ways to read the outputs that fit the model's config, the most likely ones first."""
    numbers = list(_numbers(getattr(model, "config", None) or getattr(getattr(model, "module", None), "config", None)))
    widths = {number for name, number in numbers if "expert" in name}
    choices = sorted({number for name, number in numbers if _TOP_K.search(name)})
    columns = [name for name, value in batch.items() if name.endswith("mask") and isinstance(value, Tensor)]
    masks = [*dict.fromkeys(["attention_mask", *columns]), None]
    for output, layers in outputs.items():
        if not _is_layers(layers) or not ("router" in output or layers[0].shape[-1] in widths):
            continue
        n_experts = layers[0].shape[-1]
        fitting = [k for k in choices if 0 < k <= n_experts] or range(1, n_experts + 1)
        yield from (
            RouterReading(output, router, n_experts, k, mask) for router in _ROUTERS for mask in masks for k in fitting
        )


def _numbers(config: Any) -> Iterator[tuple[str, int]]:
    """Yield the names and values of all integers in a config, those in lists and in nested configs included."""
    entries = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    for name, value in entries.items():
        if isinstance(value, PreTrainedConfig | Mapping):
            yield from _numbers(value)
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int) and not isinstance(number, bool):
                yield str(name), number


def _is_layers(value: Any) -> TypeGuard[Sequence[Tensor]]:
    """Return whether an output is a tensor per layer of numbers per expert."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(v, Tensor) and v.ndim > 1 and v.is_floating_point() for v in value)
        and len({v.shape[-1] for v in value}) == 1
    )


def _probabilities(layer_NE: Tensor, router: Router) -> Tensor:
    if router == "probabilities":
        return layer_NE
    return (widened(layer_NE) if router == "softmax in float32" else layer_NE).softmax(-1)
