"""Set and restore the state that a forward pass changes besides its outputs: generators, buffers, modes."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .fingerprint import is_expanded
from .model_wrapper import configs_in
from .module_attributes import preserve_attributes
from .written_weights import preserve_weights


@dataclass(frozen=True)
class Generators:
    """The random number generator states of Python, NumPy, torch and this process's accelerator."""

    python: Any
    numpy: Any
    cpu: Tensor
    device: Tensor | None

    @classmethod
    def now(cls) -> "Generators":
        device = _device()
        on_device = device.get_rng_state() if device is not None else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), on_device)

    def state_dict(self) -> dict[str, Any]:
        """Return the states as tensors, numbers and strings, which load without running code."""
        kind, keys, *others = self.numpy
        numpy_state = (kind, torch.from_numpy(keys.astype(np.int64)), *others)
        return {"python": self.python, "numpy": numpy_state, "cpu": self.cpu, "device": self.device}

    @classmethod
    def of_state(cls, state_dict: dict[str, Any]) -> "Generators":
        kind, keys, *others = state_dict["numpy"]
        numpy_state = (kind, keys.numpy().astype(np.uint32), *others)
        return cls(state_dict["python"], numpy_state, state_dict["cpu"], state_dict["device"])

    def unchanged(self) -> bool:
        """Return whether no random number has been drawn since."""
        now = Generators.now()
        same = all(map(np.array_equal, self.numpy, now.numpy)) and self.python == now.python
        on_device = self.device is None or now.device is None or torch.equal(self.device, now.device)
        return same and on_device and torch.equal(self.cpu, now.cpu)

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        device = _device()
        if self.device is not None and device is not None:  # the states may come from another machine
            device.set_rng_state(self.device)


def _device() -> Any:
    # Data workers are forked and must not touch the accelerator.
    at_hand = torch.accelerator.is_available() and torch.utils.data.get_worker_info() is None
    return torch.get_device_module() if at_hand else None


def buffers_of(*modules: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return every buffer as a pair of the module that has it and its name there."""
    return [(inner, name) for inner in _inside(modules) for name, b in inner._buffers.items() if b is not None]


def unset_buffers_of(*modules: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the buffers that are declared but None, as pairs of module and name."""
    return [(inner, name) for inner in _inside(modules) for name, b in inner._buffers.items() if b is None]


def _inside(modules: Sequence[nn.Module]) -> list[nn.Module]:
    return list(dict.fromkeys(inner for module in modules for inner in module.modules()))


@dataclass(frozen=True)
class Buffers:
    """A copy of buffers, such as batch-norm statistics.

    Attributes:
        kept: maps module and name to the buffer and its copy.
        unset: buffers that were declared but None. A forward pass may set them.
    """

    kept: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]]
    unset: Sequence[tuple[nn.Module, str]] = ()

    @classmethod
    def now(cls, buffers: Sequence[tuple[nn.Module, str]]) -> "Buffers":
        found = ((place, place[0]._buffers[place[1]]) for place in buffers)
        return cls({place: (buffer, buffer.clone()) for place, buffer in found if buffer is not None})

    @classmethod
    def of(cls, *modules: nn.Module) -> "Buffers":
        """Return a copy of all buffers of `modules`."""
        return cls(cls.now(buffers_of(*modules)).kept, unset_buffers_of(*modules))

    def moved(self, module: nn.Module, name: str) -> bool:
        """Return whether a buffer was replaced or has other values.

        Its version does not show this: batch norm writes to its running statistics without incrementing it.
        """
        buffer, value = self.kept[module, name]
        return module._buffers[name] is not buffer or not torch.equal(buffer, value)

    def all_moved(self) -> set[nn.Module]:
        """Return the modules with a buffer that was replaced or has other values."""
        return {module for module, name in self.kept if self.moved(module, name)}

    def restore(self) -> None:
        with torch.no_grad():
            for module, name in self.unset:
                module._buffers[name] = None
            for (module, name), (buffer, value) in self.kept.items():
                module._buffers[name] = buffer  # a forward pass may have replaced it
                # Expanded buffers cannot be written to. Only they are compared, because comparing waits for the device.
                if not is_expanded(buffer) or not torch.equal(buffer, value):
                    buffer.copy_(value)


class TensorVersions:
    """The versions of named tensors, to find out later which were changed in place."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._before = {name: (tensor, tensor._version) for name, tensor in tensors.items()}

    def changed(self) -> list[str]:
        """Return the names of the tensors that were written to since, even if with equal values."""
        return [name for name, (tensor, version) in self._before.items() if tensor._version != version]


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Restore every random number generator on exit."""
    before = Generators.now()
    try:
        yield
    finally:
        before.restore()


def seed_all(*seed: int) -> None:
    """Seed every generator from a tuple of integers. Different tuples give different random numbers."""
    mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    if _device() is None:
        torch.default_generator.manual_seed(mixed)  # `torch.manual_seed` would spend 0.3 ms looking for accelerators
    else:
        torch.manual_seed(mixed)


@contextmanager
def preserve_buffers(*modules: nn.Module) -> Iterator[None]:
    """Restore the buffers of modules on exit."""
    before = Buffers.of(*modules)
    try:
        yield
    finally:
        before.restore()


@contextmanager
def training_mode(model: nn.Module, *, training: bool | None) -> Iterator[None]:
    """Put every submodule in train or eval mode (None: leave it), and restore its previous mode on exit."""
    modes = [(module, module.training) for module in model.modules()]
    if training is not None:
        model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def preserve_gradients(model: nn.Module) -> Iterator[None]:
    """Clear the gradients of a model, and restore them on exit."""
    before = [(p, p.grad) for p in model.parameters()]
    for p, _ in before:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in before:
            p.grad = gradient


@contextmanager
def cast_tensors(
    tensors: Sequence[Tensor], dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Iterator[None]:
    """Convert weights or buffers to another dtype or device, and restore their original data on exit."""
    before = [t.data for t in tensors]
    try:
        for t in tensors:
            t.data = t.data.to(device=device, dtype=dtype)
        yield
    finally:
        for t, data in zip(tensors, before, strict=True):
            t.data = data


@contextmanager
def inspection_mode(model: nn.Module, *modules: nn.Module) -> Iterator[None]:
    """Hold a model in eval mode without gradients, to try it out.

    On exit, restore generators, buffers, modes, plain attributes, the model's `problem_type`, and weights that passes
    write to.

    Args:
        modules: modules besides the model that compute the loss.
    """
    with (
        torch.no_grad(), preserve_rng(), preserve_buffers(model, *modules), training_mode(model, training=False),
        preserve_problem_type(model), preserve_attributes(model, *modules), preserve_weights(model, *modules),
    ):  # fmt: skip
        yield


@contextmanager
def preserve_problem_type(model: nn.Module) -> Iterator[None]:
    """Restore `config.problem_type` on exit.

    Transformers' heads infer it from the labels of their first forward pass. Labels that ftaccum rejects must not
    decide it for the corrected ones.
    """
    before = [(config, getattr(config, "problem_type", None)) for config in configs_in(model)]
    try:
        yield
    finally:
        for config, kind in before:
            if getattr(config, "problem_type", None) != kind:
                config.problem_type = kind
