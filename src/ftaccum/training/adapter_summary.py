"""The adapters of a PEFT model, as a record for the banner and the model card."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..runtime.adapters import fully_trained_modules, is_peft_model
from ..runtime.model_wrapper import model_to_save

_NAMES = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}


@dataclass(frozen=True)
class AdapterSummary:
    """The adapters of a model.

    Attributes:
        kind: their kind, such as "LoRA".
        numbers: their rank, alpha and dropout, if they have these.
        whole: the names of the modules that are trained in full.
        n_trained: the number of parameters that are trained.
        n_parameters: the number of all parameters.
    """

    kind: str
    numbers: Mapping[str, float]
    whole: tuple[str, ...]
    n_trained: int
    n_parameters: int

    def __str__(self) -> str:
        named = ", ".join([self.kind, *(f"{name} {number}" for name, number in self.numbers.items())])
        also = f"; trained in full: {', '.join(self.whole)}" if self.whole else ""
        share = self.n_trained / max(1, self.n_parameters)
        return f"{named}{also}; {self.n_trained:,} of {self.n_parameters:,} parameters are trained ({share:.2%})"


def summarize_adapters(model: Any) -> AdapterSummary | None:
    """Return the adapters of a PEFT model; None for another model."""
    model = model_to_save(model)
    if not is_peft_model(model):
        return None
    configuration = next(iter(model.peft_config.values()))
    kind = getattr(configuration.peft_type, "value", configuration.peft_type)
    numbers = {name: getattr(configuration, key) for key, name in _NAMES.items() if hasattr(configuration, key)}
    whole = tuple(fully_trained_modules(model))
    return AdapterSummary(kind.replace("LORA", "LoRA"), numbers, whole, *model.get_nb_trainable_parameters())
