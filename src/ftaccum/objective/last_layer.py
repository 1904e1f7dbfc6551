"""The last layer of a model, computed only at the positions that the rest of the model reads.

A classifier reads the first position of each row, or the last one. Then the last layer needs keys and values of all
positions, but queries, the feed-forward part and the norms after attention of one only. The others are a tenth of the
forward and the backward pass of an encoder with six layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import recursively_apply
from torch import Tensor, nn

from ..runtime.lazy.tensor import LazyPass, is_lazy, whole
from ..runtime.lazy.value import Frame, LazyError
from ..runtime.log import logger
from ..runtime.memory import is_out_of_memory
from ..runtime.model_context import checkpoints_layers
from ..runtime.module_attributes import ModuleAttributes, has_hooks, has_hooks_on_gradients
from ..runtime.sharding.tensors import is_sharded
from .labelled_head import modules_around

_MANY = 3  # repeated windows, after which a warning follows


class LastLayer:
    """Makes the input of a model's last layer lazy, so that the positions that are read determine what is computed.

    Attributes:
        layer: the last layer.
    """

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        self.layer = layer
        self._model, self._around = model, modules_around(model, layer)
        self._n_failed = 0

    @contextmanager
    def lazily(self) -> Iterator[list[Frame]]:
        """Make the input lazy in the forward passes until exit, unless hooks read what the layer computes.

        Yields:
            The frames of these passes.

        Raises:
            LazyError: if a pass fails that may succeed with plain tensors.
        """
        passes: list[LazyPass] = []
        frames: list[Frame] = []
        if self.reason() is not None:
            yield frames
            return

        def before(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...] | None:
            if not inputs or not can_be_lazy(inputs[0]):
                return None
            passes.append(LazyPass(inputs[0]))
            frames.append(passes[-1].frame)
            return (passes[-1].hidden, *inputs[1:]), options

        handles = [
            self.layer.register_forward_pre_hook(before, with_kwargs=True),
            self._model.register_forward_hook(_with_whole_outputs),
        ]
        try:
            yield frames
            for each in passes:
                each.close()
        except Exception as error:
            if isinstance(error, LazyError) or is_out_of_memory(error):
                raise
            raise LazyError(f"{type(error).__name__}: {error}") from error
        finally:
            for handle in handles:
                handle.remove()

    def log_failed_pass(self, error: Exception) -> None:
        """Log that a window is repeated with the whole layer, and warn if that is not rare."""
        self._n_failed += 1
        logger.debug(f"The last layer is computed at all positions in one window: {error}.")
        if self._n_failed == _MANY:
            logger.warning(
                f"In {_MANY} windows so far, a pass could not compute its last layer only at the positions that are "
                f"read, so these windows were computed twice ({error}). `loss_head='full'` avoids that."
            )

    def attributes(self, *others: nn.Module) -> ModuleAttributes:
        """Return the attributes of the modules of the model, and of others, as they are now."""
        return ModuleAttributes(self._model, *others)

    def reason(self) -> str | None:
        """Return why the layer is computed at all positions; None if nothing is known to speak against less."""
        if any(map(has_hooks, self.layer.modules())) or any(map(has_hooks_on_gradients, self._around)):
            return "the last layer has hooks, which may read all positions"
        if checkpoints_layers(self._model):
            return "the layers are checkpointed"
        return "the model is sharded" if is_sharded(self._model) else None


def can_be_lazy(hidden: Any) -> bool:
    """Return whether a value is hidden states of several positions on a CPU.

    On accelerators no gain is known: recording operations takes time on the host.
    """
    is_plain = type(hidden) is Tensor and hidden.ndim == 3 and hidden.shape[1] > 1
    return is_plain and hidden.device.type == "cpu" and hidden.is_floating_point()


def _with_whole_outputs(_: nn.Module, __: Any, outputs: Any) -> Any:
    """Compute lazy outputs of a model at all positions: what runs after it may be no function of torch."""
    return recursively_apply(whole, outputs, test_type=is_lazy)
