"""A schedule-free optimizer (Defazio et al. 2024, arXiv:2405.15682)."""

from typing import Any

import torch
from torch.optim import Optimizer


class ScheduleFreeSGD(Optimizer):
    """SGD with gradients at y = (1 - β) z + β x, which update z; x is the average of z.

    The weights hold y in train mode and x in eval mode; z is in the state.
    """

    def __init__(self, params: Any, lr: float = 1.0, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": 0.0, "train_mode": False, "n_steps": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        for group in self.param_groups:
            assert group["train_mode"], "a step in eval mode"
            group["n_steps"] += 1
            beta, share = group["beta"], 1 / group["n_steps"]
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                x = (p - (1 - beta) * z) / beta
                z -= group["lr"] * (p.grad + group["weight_decay"] * p)
                x.lerp_(z, share)
                p.copy_((1 - beta) * z + beta * x)

    @torch.no_grad()
    def train(self) -> None:
        for group in self.param_groups:
            if not group["train_mode"]:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], 1 - group["beta"])
                group["train_mode"] = True

    @torch.no_grad()
    def eval(self) -> None:
        for group in self.param_groups:
            if group["train_mode"]:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], 1 - 1 / group["beta"])
                group["train_mode"] = False
