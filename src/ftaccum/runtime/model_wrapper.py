"""A module around a model, for losses of the user's own."""

from typing import Any

from torch import nn


class ModelWrapper(nn.Module):
    """A module that computes a loss with a model of Transformers, which alone is saved.

    Subclasses define `forward`, which may run the model several times, or with further modules:

        class Distillation(ftaccum.ModelWrapper):
            def __init__(self, student, teacher):
                super().__init__(student)
                self.teacher = teacher.requires_grad_(False)

            def forward(self, input_ids, attention_mask, labels):
                ...
                return {"loss": loss, "logits": logits}

    ftaccum saves `model` as it would without the wrapper, also a PEFT model, so that `from_pretrained` loads it.
    `gradient_checkpointing` concerns `model`. Frozen modules besides it are neither trained nor saved with it.

    Attributes:
        model: the model.
        config: its configuration.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_input_embeddings(self) -> Any:
        """Return the model's input embeddings."""
        return self.model.get_input_embeddings()


def inner_model(model: Any) -> Any:
    """Return the model in a `ModelWrapper`; any other model itself."""
    return inner_model(model.model) if isinstance(model, ModelWrapper) else model


def with_inner_model(model: Any, inner: Any) -> Any:
    """Return a `ModelWrapper` with another model inside; in place of any other model, `inner` itself."""
    if not isinstance(model, ModelWrapper):
        return inner
    model.model = with_inner_model(model.model, inner)
    return model
