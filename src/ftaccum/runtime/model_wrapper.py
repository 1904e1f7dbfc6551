"""A module that computes a loss with a model, and the model inside of it."""

from typing import Any

from torch import nn


class ModelWrapper(nn.Module):
    """A module that computes a loss with a model. Only the model is saved when the run has finished.

    Subclasses define `forward`, which may run the model several times, or with further modules:

        class Distillation(ftaccum.ModelWrapper):
            def __init__(self, student, teacher):
                super().__init__(student)
                self.teacher = teacher.requires_grad_(False)

            def forward(self, input_ids, attention_mask, labels):
                ...
                return {"loss": loss, "logits": logits}

    ftaccum saves `model` as it would without the wrapper, also a PEFT model, so that `from_pretrained` loads it.
    `gradient_checkpointing` and `lora` concern `model`. Modules besides it that are wholly frozen, such as a teacher,
    are not trained, and stay in eval mode. The weights of others are trained, but not saved with `model`, which a
    warning says.

    Checkpoints leave out the frozen weights of a PEFT model, as without the wrapper. They contain all other weights,
    those of frozen modules too, because `forward` or a callback may change these. So the checkpoints of a distillation
    take as much more space as its teacher, and a resumed run continues with the teacher of its checkpoint.

    Attributes:
        model: the model.
        config: its configuration; None if it has none.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, getattr(model, "config", None)

    def train(self, mode: bool = True) -> "ModelWrapper":
        """Set train or eval mode. Frozen modules besides the model stay in eval mode."""
        super().train(mode)
        for module in self.children():
            weights = list(module.parameters())
            if module is not self.model and weights and not any(weight.requires_grad for weight in weights):
                module.eval()
        return self

    def get_input_embeddings(self) -> Any:
        """Return the model's input embeddings."""
        return self.model.get_input_embeddings()


def model_to_save(model: Any) -> Any:
    """Return the model in a `ModelWrapper`; any other model itself."""
    return model_to_save(model.model) if isinstance(model, ModelWrapper) else model


def trained_besides(model: Any) -> list[str]:
    """Return the names of trainable weights of a `ModelWrapper` that are not those of its model."""
    if not isinstance(model, ModelWrapper):
        return []
    inside = {id(weight) for weight in model_to_save(model).parameters()}
    return [name for name, weight in model.named_parameters() if weight.requires_grad and id(weight) not in inside]


def with_model_to_save(model: Any, other: Any) -> Any:
    """Return a `ModelWrapper` with another model inside; in place of any other model, `other` itself."""
    if not isinstance(model, ModelWrapper):
        return other
    model.model = with_model_to_save(model.model, other)
    return model


def configs_in(model: nn.Module) -> list[Any]:
    """Return the different configurations of a model and of its modules, such as a teacher in a `ModelWrapper`."""
    found = (getattr(module, "config", None) for module in model.modules())
    return [*{id(config): config for config in found if config is not None}.values()]
