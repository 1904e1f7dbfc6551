"""What a forward pass moves besides its outputs (generators, buffers, modes): set it, put it back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leaves the generators of Python, NumPy, torch and this process's accelerator as they were found."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device: Any = torch.get_device_module() if torch.accelerator.is_available() else None
    on_device = device.get_rng_state() if device is not None else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if device is not None:
            device.set_rng_state(on_device)


def seed_all(*seed: int) -> None:
    """Seeds every generator from a tuple of integers, so that no two uses of one seed draw alike."""
    mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)  # the accelerators' generators, too


@contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Leaves the model's buffers (batch-norm statistics, for one) as they were found."""
    kept = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in kept:
                module._buffers[name] = buffer  # a forward pass may have put another in its place
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Puts every submodule in train or eval mode, and then back in the mode it was found in."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def only_looking(model: nn.Module) -> Iterator[None]:
    """For trying a model out: eval mode, no gradients, and generators, buffers and modes as they were afterwards."""
    with torch.no_grad(), preserved_rng(), preserved_buffers(model), in_mode(model, training=False):
        yield
