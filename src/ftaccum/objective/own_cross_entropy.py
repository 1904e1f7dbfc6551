"""A check whether a model's own loss is the mean cross entropy of its logits and labels."""

from torch import nn

from ..runtime.memory import is_out_of_memory
from ..runtime.state_guards import inspection_mode
from .batch_changes import fresh_batch_for
from .cross_entropy import CrossEntropy
from .deterministic_forward import DeterministicMode
from .forward import Forward
from .index_guard import IndexGuard
from .item_counts import Batch
from .model_forward import ModelForward
from .perturbation import float32_weights, has_narrow_weights, perturb_head
from .probe import EXPLAINED, EXPLAINED_IN_HALF, relative


def own_cross_entropy(model: nn.Module, forward: ModelForward, batch: Batch, ignore_index: int) -> CrossEntropy | None:
    """Return the plain cross entropy that equals the model's own loss, with or without a shift; None if none does.

    Compare the two on a few rows, in eval mode and in train mode without dropout. With the plain loss, the model runs
    without labels, as it will in training. Weights, modes, generators and buffers are restored.

    Args:
        model: the model on its device, before it is wrapped.
        forward: its forward pass with its own loss.
        batch: a few labelled rows, on the host.
        ignore_index: the label that the model's own loss ignores.
    """
    with inspection_mode(model), IndexGuard():
        forward.settle_outputs(model, lambda: fresh_batch_for(model, batch))
    for loss in (CrossEntropy(ignore_index), CrossEntropy(ignore_index, shifted=True)):
        plain = ModelForward(model, batch, loss)
        try:
            if _are_equal(model, forward, plain, batch):
                return loss
        except Exception as error:  # the logits have another shape, or the model needs its labels
            if is_out_of_memory(error):
                raise
    return None


def _are_equal(model: nn.Module, own: Forward, plain: Forward, batch: Batch) -> bool:
    with inspection_mode(model), IndexGuard():
        try:
            with float32_weights(model) as widened:
                return _differ_by(model, own, plain, widened(batch)) <= EXPLAINED
        except RuntimeError as error:  # the model needs its own type
            if is_out_of_memory(error) or not has_narrow_weights(model):
                raise
        return _differ_by(model, own, plain, batch) <= EXPLAINED_IN_HALF


def _differ_by(model: nn.Module, own: Forward, plain: Forward, batch: Batch) -> float:
    """Return the larger relative difference of two losses, in eval mode and in train mode."""

    def loss_of(forward: Forward) -> float:
        return forward.unweighted_loss(model, fresh_batch_for(model, batch)).item()

    with perturb_head(model):
        in_eval = relative(loss_of(plain), loss_of(own))
        with DeterministicMode.of(model, lambda: [loss_of(own)]).passes():
            return max(in_eval, relative(loss_of(plain), loss_of(own)))
