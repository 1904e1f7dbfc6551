"""Versions and devices, as the report shows them."""

import platform
from typing import Any

import accelerate
import torch
import transformers

import ftaccum

from .job import accelerator

GB = 1e9


def describe_machine() -> dict[str, Any]:
    """Return the versions of the packages, and the name and memory of each GPU."""
    modules = (ftaccum, torch, transformers, accelerate)
    versions = {"python": platform.python_version()} | {m.__name__: str(m.__version__) for m in modules}
    return {"versions": versions, "cuda": torch.version.cuda, "system": platform.platform(), "devices": devices()}


def devices() -> list[str]:
    """Return the name and memory of each visible GPU."""
    device = accelerator()
    if device is None:
        return []
    return [_describe(device.type, n) for n in range(torch.accelerator.device_count())]


def _describe(kind: str, n: int) -> str:
    if kind != "cuda":
        return f"{kind}:{n}"
    properties = torch.cuda.get_device_properties(n)
    return f"{properties.name}, {properties.total_memory / GB:.0f} GB"
