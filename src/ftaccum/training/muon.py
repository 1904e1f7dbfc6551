"""Muon for hidden matrices, and AdamW for all other parameters, as one optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer


class MuonWithAdamW(Optimizer):
    """An optimizer that updates hidden matrices with `torch.optim.Muon` and the rest with `torch.optim.AdamW`.

    Both share their parameter groups and their state with this one, so schedules and `state_dict` reach everything.
    Muon's updates are scaled to the size of AdamW's (`adjust_lr_fn="match_rms_adamw"`; Liu et al. 2025,
    arXiv:2502.16982), so that one learning rate and one weight decay suit both.

    Example:
        >>> MuonWithAdamW([{"params": matrices, "lr": 5e-5}], [{"params": others, "lr": 5e-5}])

    Attributes:
        takes_sharded_weights: Muon multiplies sharded matrices as a whole, so its step is the same.
    """

    takes_sharded_weights = True

    def __init__(self, muon_groups: list[dict[str, Any]], adamw_groups: list[dict[str, Any]]) -> None:
        """Args:
        muon_groups: parameter groups of matrices; at least one.
        adamw_groups: parameter groups of the other parameters; may be empty.
        """
        self._muon = Muon(muon_groups, adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW(adamw_groups, fused=True) if adamw_groups else None
        others = [] if self._adamw is None else self._adamw.param_groups
        self._n_muon = len(self._muon.param_groups)
        super().__init__([*self._muon.param_groups, *others], {})
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters. A closure runs once, before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon.step()
        if self._adamw is not None:
            self._adamw.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both optimizers."""
        return super().state_dict()  # defined here because a class that inherits it leaves inner states out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of both optimizers."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Give both optimizers this one's parameter groups and state."""
        self._muon.state = self.state
        self._muon.param_groups = self.param_groups[: self._n_muon]
        if self._adamw is not None:
            self._adamw.state = self.state
            self._adamw.param_groups = self.param_groups[self._n_muon :]
