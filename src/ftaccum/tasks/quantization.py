"""Load a model with weights of 4 or 8 bits, through bitsandbytes."""

import importlib.util
from typing import Any

from ..errors import refuse

_INSTALL = "Install it with `pip install bitsandbytes`."


def faults_of_quantization(*, load_in_4bit: bool, load_in_8bit: bool, has_adapters: bool) -> list[str]:
    """Return a sentence for each fault of `load_in_4bit` and `load_in_8bit` that can be found without the model.

    Args:
        has_adapters: whether the run trains adapters.
    """
    if not (load_in_4bit or load_in_8bit):
        return []
    if load_in_4bit and load_in_8bit:
        return ["`load_in_4bit` and `load_in_8bit` are both True. Choose one of them."]
    name = "load_in_4bit" if load_in_4bit else "load_in_8bit"
    faults = []
    if not has_adapters:
        faults.append(f"`{name}` is True, but weights of so few bits cannot be trained. Train adapters: add `lora`.")
    if importlib.util.find_spec("bitsandbytes") is None:
        faults.append(f"`{name}` needs the package `bitsandbytes`, which is not installed. {_INSTALL}")
    return faults


def quantization_config(*, load_in_4bit: bool, load_in_8bit: bool, dtype: Any = None) -> Any:
    """Return the `quantization_config` that `from_pretrained` takes; None if neither option is on.

    The weights of linear layers get 4 bits (NF4, with their scales quantized again) or 8 bits. The others keep their
    type. Train with `gradient_checkpointing` as usual; the model needs no other preparation.

    Args:
        dtype: the type to compute 4-bit layers in. None: bfloat16 on an accelerator that supports it, else float32.

    Raises:
        SettingsError: if both options are on, or if bitsandbytes is missing or cannot use this machine's device.
    """
    refuse(faults_of_quantization(load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit, has_adapters=True))
    if not (load_in_4bit or load_in_8bit):
        return None
    import torch
    from transformers import BitsAndBytesConfig

    name = "load_in_4bit" if load_in_4bit else "load_in_8bit"
    if reason := _why_not(load_in_4bit):
        refuse(
            [
                f"`{name}` is True, but bitsandbytes cannot quantize weights on this machine: {reason} Update it "
                f"(`pip install -U bitsandbytes`), or leave `{name}` out."
            ]
        )
    if load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or (torch.bfloat16 if has_bf16 else torch.float32),
    )


def _why_not(load_in_4bit: bool) -> str | None:
    """Return why bitsandbytes cannot quantize a small matrix on this process's device; None if it can."""
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        from bitsandbytes import functional

        weights = torch.ones(64, 64, dtype=torch.float16, device=device)
        if load_in_4bit:
            functional.dequantize_4bit(*functional.quantize_4bit(weights, quant_type="nf4"))
        else:
            functional.int8_vectorwise_quant(weights)
    except Exception as error:  # missing libraries show in many ways
        return f"{type(error).__name__}: {error}".rstrip(".") + "."
    return None
