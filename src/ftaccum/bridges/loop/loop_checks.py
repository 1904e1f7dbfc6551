"""Checks of the arguments and the windows of a loop that the user wrote."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ...errors import SettingsError, refuse, shown
from ...fields import Rule, is_positive_int
from ...objective.item_counts import Batch, tensors_of
from ...runtime.accelerator import requested_processes
from ..exact_options import faults_of_options

_COUNT = Rule(is_positive_int, "a positive integer")


def check_arguments(model: Any, accelerator: Any, scaler: Any, **options: Any) -> None:
    """Raise SettingsError, with one sentence for each argument of `ExactAccumulation` that is invalid.

    Args:
        options: the other arguments, by name.
    """
    faults = faults_of_options(options)
    if not isinstance(model, nn.Module):
        faults.append(
            f"`model` must be a torch.nn.Module, but is {shown(model)} instead. Give the model that you train."
        )
    elif next(model.parameters(), None) is None:
        faults.append(
            f"`model` has no parameters to train. It is a {type(model).__name__}. Give the model whose weights the "
            "optimizer updates."
        )
    if accelerator is not None and not isinstance(accelerator, Accelerator):
        faults.append(
            f"`accelerator` must be an accelerate.Accelerator or None, but is {shown(accelerator)} instead. Leave it "
            "out in a loop without Accelerate."
        )
    elif accelerator is not None and accelerator.num_processes != (started := requested_processes()):
        faults.append(
            f"`accelerator` sees {accelerator.num_processes} of {started} processes, so that each would "
            "train a model of its own. Without GPUs, create it with `Accelerator(cpu=True)`."
        )
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        faults.append(f"`scaler` must be a torch.amp.GradScaler or None, but is {shown(scaler)} instead.")
    elif scaler is not None and accelerator is not None:
        faults.append(
            "`scaler` and `accelerator` are both given, but an Accelerator has its own scaler. Give one of them."
        )
    refuse(faults)


def check_loader(loader: Any, k: Any) -> None:
    """Raise SettingsError if `windows` cannot take lists of k batches from a loader."""
    faults = [_COUNT.fault("k", k, "It is the number of micro-batches per update.")]
    if isinstance(loader, Mapping | Tensor | str) or not hasattr(loader, "__iter__"):
        faults.append(f"`loader` must yield batches, as a DataLoader does, but is a {type(loader).__name__} instead.")
    refuse([fault for fault in faults if fault is not None])


def check_window(window: Any) -> list[Batch]:
    """Return the batches of a window.

    Raises:
        SettingsError: if they are not a list of batches, or gradients are disabled.
    """
    if not torch.is_grad_enabled():
        raise SettingsError(
            [
                "`backward` needs gradients, but they are disabled. Call it outside of `torch.no_grad()` and "
                "`torch.inference_mode()`."
            ]
        )
    if not isinstance(window, Sequence) or isinstance(window, str):
        raise SettingsError(
            [
                f"`window` must be a list of batches, as `windows` yields, but is a {type(window).__name__} instead. "
                "For a single batch, give `[batch]`."
            ]
        )
    refuse([fault for n, batch in enumerate(window) if (fault := _fault_of_batch(batch, n))])
    return list(window)


def _fault_of_batch(batch: Any, n: int) -> str | None:
    allowed = "must be a dict of tensors, or a pair (inputs, targets)"
    if isinstance(batch, Mapping):
        return None if tensors_of(batch) else f"Micro-batch {n} {allowed}, but has no tensors. Check the collator."
    if not isinstance(batch, list | tuple):
        return f"Micro-batch {n} {allowed}, but is a {type(batch).__name__} instead. For one batch, give `[batch]`."
    if batch and all(isinstance(row, Mapping) for row in batch):
        return (
            f"Micro-batch {n} {allowed}, but is a list of {len(batch)} dicts instead. Let `collate_fn` of the loader "
            "stack them."
        )
    if len(batch) != 2 or not tensors_of(batch):
        return (
            f"Micro-batch {n} {allowed}, but has {len(batch)} parts instead. Put all inputs of the model into the "
            "first part: `((ids, mask), labels)`."
        )
    return None
