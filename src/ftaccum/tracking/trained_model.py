"""A trained model, and how to save it."""

from dataclasses import dataclass
from typing import Any

from ..insight.run_metadata import RunMetadata


@dataclass(frozen=True)
class TrainedModel:
    """A trained model, and how to save it.

    Attributes:
        model: the model; a PEFT model if it has adapters.
        tokenizer: saved with the model; None if there is none.
        save: the setting: whether adapters are saved, merged, or both.
        metadata: what the model card says of the run; None for no card.
    """

    model: Any
    tokenizer: Any = None
    save: str = "adapter"
    metadata: RunMetadata | None = None
