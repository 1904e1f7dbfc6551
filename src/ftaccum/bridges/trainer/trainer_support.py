"""What `exact` does not support, each refused with one sentence before training."""

from typing import Any

import transformers
from torch import nn
from transformers import Trainer

from ...errors import SettingsError, refuse
from ...runtime.wrapped_models import DATA_PARALLEL, faults_of_model

_NEWEST_CHANGE = "5.19"  # since then, `loss_is_scaled_for_ga` tells a Trainer to use the loss as it is
_OURS = ("compute_loss", "get_batch_samples")


def check_trainer_class(trainer_class: Any) -> None:
    """Raise SettingsError if gradient accumulation of this class cannot be made exact."""
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        given = (
            f"an instance of {type(trainer_class).__name__}"
            if isinstance(trainer_class, Trainer)
            else repr(trainer_class)
        )
        raise SettingsError(
            [
                f"`exact` takes the class `Trainer` or a subclass of it, but got {given}. Write "
                "`ftaccum.exact(Trainer)(model=model, args=args, …)`."
            ]
        )
    if not hasattr(Trainer, "loss_is_scaled_for_ga"):
        raise SettingsError(
            [
                f"`exact` needs transformers {_NEWEST_CHANGE} or newer, but {transformers.__version__} is installed. "
                "Upgrade it with pip."
            ]
        )
    if getattr(trainer_class, "_prepare_inputs") is not Trainer._prepare_inputs:  # noqa: B009
        raise SettingsError(
            [
                f"{trainer_class.__name__} makes its batches during training, as trainers that generate text do, so "
                "their loss items cannot be counted before the first forward pass. Use "
                f"{trainer_class.__name__} without `exact`."
            ]
        )


def check_overrides(trainer_class: type, exact_class: type) -> None:
    """Raise SettingsError if a subclass overrides a method that weighs the loss."""
    subclasses = trainer_class.__mro__[: trainer_class.__mro__.index(exact_class)]
    refuse(
        [
            f"`{trainer_class.__name__}.{name}` would run outside of the weighting that `exact` adds, and change it. "
            "Define it in a class without `exact`, and decorate that one: `@ftaccum.exact` above "
            f"`class {trainer_class.__name__}(Trainer)`."
            for name in _OURS
            if any(name in vars(subclass) for subclass in subclasses)
        ]
    )


def known_as_inexact(trainer: Any) -> list[str]:
    """Return a sentence on each part of a trainer's loss that mixes rows, although a few rows may not show it."""
    found = []
    if getattr(trainer, "calculate_KL", False):
        found.append(
            "KTO's loss compares each row with the mean KL divergence of its micro-batch, so that accumulating it only "
            "approximates one large batch. The difference grows as the model moves away from the reference model. "
            "`loss_type='apo_zero_unpaired'` has no such term, and is exact."
        )
    kinds = getattr(trainer.args, "loss_type", None) or ()
    if "aot" in ([kinds] if isinstance(kinds, str) else kinds):
        found.append(
            "The loss type 'aot' of DPO sorts the log ratios of a micro-batch before it compares them, so that "
            "accumulating it only approximates one large batch. The difference grows as the model moves away from the "
            "reference model. `loss_type='sigmoid'` compares the two answers to each prompt, and is exact."
        )
    return found


def check_trainer(trainer: Any) -> None:
    """Raise SettingsError if a trainer is configured for something that has not been shown to be exact."""
    accelerator = trainer.accelerator
    is_fsdp = trainer.is_fsdp_enabled, trainer.is_fsdp_xla_enabled, trainer.is_distributed_loading_by_transformers
    kinds = {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": any(is_fsdp),
        "tensor, context or sequence parallelism": getattr(accelerator, "parallelism_config", None) is not None,
    }
    steps = trainer.args.gradient_accumulation_steps
    configured = [kind for kind, is_on in kinds.items() if is_on]
    faults = faults_of_model(trainer.model, accelerator.num_processes, "exact", configured)
    if trainer.args.n_gpu > 1 and DATA_PARALLEL not in faults:
        faults.append(DATA_PARALLEL)
    if steps < 1:
        faults.append(f"`gradient_accumulation_steps` must be a positive integer, but is {steps} instead.")
    if accelerator.num_processes > 1 and not accelerator.even_batches:
        faults.append(
            "`accelerator_config.even_batches` is False, so processes may have unequal numbers of batches and wait for "
            "each other forever. Leave it out: repeated rows get no weight."
        )
    if isinstance(trainer.model, nn.parallel.DistributedDataParallel):
        faults.append("`model` is wrapped in DistributedDataParallel. Give the model itself: Trainer wraps it.")
    refuse(faults)
