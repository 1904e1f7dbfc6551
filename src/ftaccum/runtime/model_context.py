"""Context managers that set up the user's model for a run, and then restore everything except its weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import has_compiled_regions
from torch import nn

from ..errors import SettingsError
from .model_wrapper import configs_in, model_to_save
from .state_guards import training_mode


@contextmanager
def model_context(model: nn.Module, *, gradient_checkpointing: bool) -> Iterator[None]:
    """Hold a model in train mode. On exit, remove wrappers and restore its mode and configuration.

    Raises:
        SettingsError: if `gradient_checkpointing` is True and the model does not support it.
    """
    with (
        unwrap_on_exit(model),
        training_mode(model, training=True),
        _without_cache(model),
        _checkpointed(model, gradient_checkpointing),
    ):
        yield


@contextmanager
def compile_model(model: nn.Module) -> Iterator[None]:
    """Compile a model until exit, with graphs for any number of rows and any width."""
    before = model._compiled_call_impl
    model.compile(dynamic=True)
    try:
        yield
    finally:
        model._compiled_call_impl = before


def is_compiled(model: nn.Module) -> bool:
    """Return whether any part of a model is compiled."""
    return has_compiled_regions(model) or any(module._compiled_call_impl is not None for module in model.modules())


def has_graphs(model: nn.Module) -> bool:
    """Return whether a model is compiled as a whole, as `compile_model` does."""
    return model._compiled_call_impl is not None


@contextmanager
def run_eagerly(model: nn.Module) -> Iterator[None]:
    """Run a compiled model without its graphs, which each mode would compile again."""
    if not is_compiled(model):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def unwrap_on_exit(model: nn.Module) -> Iterator[None]:
    """On exit, remove what `Accelerator.prepare` adds to a model: an autocasting `forward` and a mark."""
    names = ("forward", "_original_forward", "_is_accelerate_prepared")
    before: dict[str, Any] = {name: model.__dict__[name] for name in names if name in model.__dict__}
    try:
        yield
    finally:
        for name in names:
            model.__dict__.pop(name, None)
        model.__dict__.update(before)


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Run a model without autocast until exit: neither Accelerate's, in `forward`, nor one that is in force."""
    given = dict(vars(model))
    if "_original_forward" in given:
        model.forward = given["_original_forward"]
    device = next(model.parameters()).device.type
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        if "_original_forward" in given:
            del model.forward
            vars(model).update({name: value for name, value in given.items() if name == "forward"})


def computes_in_16_bits(model: nn.Module) -> bool:
    """Return whether any weight is bf16 or fp16, or the model autocasts to one of them."""
    weights = list(model.parameters())
    autocasts = "_original_forward" in vars(model) or torch.is_autocast_enabled(weights[0].device.type)
    return autocasts or any(p.dtype.itemsize == 2 for p in weights)


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Turn off the cache of keys and values, which only generation needs.

    In training it takes memory, and a Transformers model that uses it does not detect packed rows.
    """
    text_config = getattr(getattr(model, "config", None), "get_text_config", lambda: None)()
    configs = {id(config): config for config in (text_config, *configs_in(model))}.values()
    caches = [(config, config.use_cache) for config in configs if getattr(config, "use_cache", None) is not None]
    for config, _ in caches:
        config.use_cache = False
    try:
        yield
    finally:
        for config, before in caches:
            config.use_cache = before


def checkpoints_layers(model: nn.Module) -> bool:
    """Return whether gradient checkpointing is enabled in layers of a model of Transformers."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def _checkpointed(model: Any, wanted: bool) -> Iterator[None]:
    """Enable gradient checkpointing until exit, if wanted."""
    model = model_to_save(model)
    if not wanted or checkpoints_layers(model):
        yield
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise SettingsError(
            [
                f"`gradient_checkpointing` is True, but {type(model).__name__} does not support it. Leave it out, or "
                "use torch.utils.checkpoint inside the module."
            ]
        )
    had_hooks = getattr(model, "_require_grads_hooks", None)
    # The reentrant variant runs a backward pass inside the backward pass, which breaks DDP's bookkeeping.
    _either(model, "activation_checkpointing_enable", "gradient_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        _either(model, "activation_checkpointing_disable", "gradient_checkpointing_disable")()
        if not had_hooks:  # Transformers does not remove its hooks on the embeddings
            model.disable_input_require_grads()


def _either(model: Any, new_name: str, old_name: str) -> Callable[..., None]:
    # Transformers renamed these methods during version 5.
    return getattr(model, new_name, None) or getattr(model, old_name)
