"""Find PEFT's adapters in a model, remove them again, and merge them into a copy."""

import copy
import warnings
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn

from .model_traits import output_embeddings

_ADAPTED = {"base_layer", "modules_to_save", "token_adapter"}  # PEFT's names in layers that it has wrapped


def has_adapters(model: Any) -> bool:
    """Return whether a model is a PEFT model, or contains adapters of PEFT."""
    if is_peft_model(model) or getattr(model, "_hf_peft_config_loaded", False):
        return True
    # Not by `peft_config`, which PEFT's `unload` leaves in older versions.
    return isinstance(model, nn.Module) and any(_ADAPTED & module._modules.keys() for module in model.modules())


def is_peft_model(model: Any) -> bool:
    """Return whether a model is a PEFT model, rather than a base model that contains adapters."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def base_of(model: Any) -> Any:
    """Return the base model of a PEFT model; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def fully_trained_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules that PEFT trains in full, besides the adapters."""
    names = [name for name, module in model.named_modules() if "modules_to_save" in module._modules]
    return [name.removeprefix("base_model.model.") for name in names]


def new_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules whose weights the checkpoint of a Transformers model did not have.

    `from_pretrained` marks the weights that it has loaded. Return nothing if no weight has a mark: the model was not
    loaded, or it is a copy.
    """
    weights = [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]  # quantized ones have none
    if not any(getattr(p, "_is_hf_initialized", False) for _, p in weights):
        return []
    new = [name.rpartition(".")[0] for name, p in weights if not getattr(p, "_is_hf_initialized", False)]
    return [name for name in dict.fromkeys(new) if name]


def mark_as_new(layer: nn.Module) -> None:
    """Let `new_modules` name a layer, because some of its rows are new."""
    layer.weight._is_hf_initialized = False  # type: ignore[union-attr]


def saved_by_peft(model: Any) -> list[str]:
    """Return the names of the weights that a PEFT model saves, and of all that are trained. Tied weights count once.

    PEFT saves adapters, modules that are trained in full, and embeddings if they have adapters or were resized. The
    weights may be on torch's meta device.
    """
    from peft import get_peft_model_state_dict  # an optional dependency

    state, saved = model.state_dict(keep_vars=True), set[int]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # saving shows them
        for adapter, config in model.peft_config.items():
            if config.is_prompt_learning:  # what is saved is computed
                saved |= {id(p) for p in model.prompt_encoder[adapter].parameters()}
            else:
                found = get_peft_model_state_dict(model, state_dict=state, adapter_name=adapter)
                saved |= {id(tensor) for tensor in found.values()}
    return [name for name, p in model.named_parameters() if p.requires_grad or id(p) in saved]


class ModuleTree:
    """The submodules of a model, and which of its parameters are trained, as they were before adapters were added."""

    def __init__(self, model: nn.Module) -> None:
        self._children = [(module, dict(module._modules)) for module in model.modules()]
        self._trained = [(p, p.requires_grad) for p in model.parameters()]
        self._without_adapters = [module for module in model.modules() if "peft_config" not in vars(module)]

    def restore(self) -> None:
        """Take the adapters out of the model. No weight is changed."""
        for module, children in self._children:
            module._modules.clear()
            module._modules.update(children)
        for p, requires_grad in self._trained:
            p.requires_grad_(requires_grad)
        for module in self._without_adapters:
            vars(module).pop("peft_config", None)


def merged_copy(model: Any) -> nn.Module:
    """Return the base model of a PEFT model with the adapters merged into its weights, on the host.

    The model itself does not change. The copy shares the memory of weights without adapters that are on the host.

    Raises:
        ValueError: if a merged weight is not finite.
    """
    return merged(_copied_to_host(model))


def merged(model: Any) -> nn.Module:
    """Merge the adapters of a PEFT model into its base model, and return the base model.

    Raises:
        ValueError: if a merged weight is not finite.
    """
    _untie_adapted(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(tied layer|tied_target_modules|no longer tied)")  # handled here
        base: Any = model.merge_and_unload(safe_merge=True)
    vars(base).pop("peft_config", None)
    if _is_untied(base):
        base.config.tie_word_embeddings = False
    return base


def _copied_to_host(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the host. It has its own copies of the weights of adapted layers only."""
    tensors = [*model.parameters(), *model.buffers()]
    inside = {id(t) for layer in _adapted_layers(model) for t in (*layer.parameters(), *layer.buffers())}
    memo: dict[int, Any] = {id(t): _on_host(t, copies=id(t) in inside) for t in tensors}
    copied = copy.deepcopy(model, memo)
    if getattr(model, "hf_device_map", None):
        copied = remove_hook_from_module(copied, recurse=True)
        for module in copied.modules():
            vars(module).pop("hf_device_map", None)
    return copied


def _on_host(tensor: Tensor, *, copies: bool) -> Tensor:
    data = tensor.detach().to("cpu", copy=copies)
    return nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data


def _adapted_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "base_layer" in module._modules]


def _untie_adapted(model: nn.Module) -> None:
    """Give adapted layers their own copies of weights that other layers use too, which merging would change there."""
    seen: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                seen[id(p)] = seen.get(id(p), 0) + 1
    for layer in _adapted_layers(model):
        for module in layer.modules():
            for name, p in module._parameters.items():
                if p is not None and seen[id(p)] > 1:
                    module._parameters[name] = nn.Parameter(p.detach().clone(), requires_grad=False)


def _is_untied(model: Any) -> bool:
    """Return whether the configuration ties input and output embeddings that have different weights."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return False
    if (output := output_embeddings(model)) is None:
        return False
    first, second = (getattr(each, "weight", None) for each in (model.get_input_embeddings(), output))
    if first is None or second is None or first is second:
        return False
    return first.shape != second.shape or not torch.equal(first, second)
