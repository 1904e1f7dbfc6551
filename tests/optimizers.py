"""Optimizers as users write them."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import SGD, AdamW, Muon, Optimizer


class Chain(Optimizer):
    """An optimizer that wraps several others and has a state dict of its own."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.defaults: dict[str, Any] = {}

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {f"optimizer {n}": optimizer.state_dict() for n, optimizer in enumerate(self.optimizers)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for n, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state_dict[f"optimizer {n}"])


def muon_and_adamw(groups: Any) -> Chain:
    """Return Muon for matrices and AdamW for the rest, both at the rate of the settings."""
    rest = [{**group, "params": [p for p in group["params"] if p.ndim != 2]} for group in groups]
    matrices = [{**group, "params": [p for p in group["params"] if p.ndim == 2]} for group in groups]
    return Chain(
        Muon([group for group in matrices if group["params"]]), AdamW([group for group in rest if group["params"]])
    )


class SAM(Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021, arXiv:2010.01412): a step by the gradient at w + ρ g / ‖g‖."""

    def __init__(self, params: Any, base: Callable[[Any], Optimizer] = SGD, rho: float = 0.05) -> None:
        super().__init__(params, {"rho": rho})
        self.base = base(self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        moves = [self.param_groups[0]["rho"] * p.grad / norm for p in held]
        for p, move in zip(held, moves, strict=True):
            p.add_(move)
        with torch.enable_grad():
            loss = closure()
        for p, move in zip(held, moves, strict=True):
            p.sub_(move)
        self.base.step()
        return loss
