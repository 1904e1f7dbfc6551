"""Distinguishes training passes from those that check the loss or the model's limits before training."""

import sys

import torch

_BEFORE_TRAINING = {"measured_objective", "window_objective", "find_ranges", "find_labelled_head", "find_last_layer"}


def in_self_check() -> bool:
    """Return whether the caller runs in a pass of the self-check, or of the search for valid ids and lengths."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_name not in _BEFORE_TRAINING:
        frame = frame.f_back
    return frame.f_code.co_name in _BEFORE_TRAINING


def is_training_pass() -> bool:
    """Return whether the caller runs in a forward pass with gradients of training, audits included."""
    return torch.is_grad_enabled() and not in_self_check()
