"""Tells the passes of training from those that look at a loss before it."""

import sys

import torch


def in_self_check() -> bool:
    """Return whether the caller runs in a pass of the self-check."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_name != "measured_objective":
        frame = frame.f_back
    return frame.f_code.co_name == "measured_objective"


def is_training_pass() -> bool:
    """Return whether the caller runs in a forward pass with gradients that is none of the self-check's."""
    return torch.is_grad_enabled() and not in_self_check()
