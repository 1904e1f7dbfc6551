"""The optimizer of a run, what it trains, and how the gradients for its steps are summed."""

from contextlib import ExitStack
from functools import cached_property

from torch import nn
from torch.optim import Optimizer

from ..runtime.gradients.fp32 import gradient_strategy
from ..runtime.gradients.plain import GradientStrategy
from ..runtime.gradients.sharded import ShardedGradients
from ..runtime.optimizers import parameters_of, switches_weights, training_weights
from ..runtime.tensor_collectives import broadcast_tensors
from .base_run import Run
from .closure import check_step
from .config import RunConfig
from .optimizer import make_optimizer, refuse_float16, warn_of_untrained_loss
from .parameter_groups import describe_groups, parameter_groups
from .rates import preserve_learning_rates, summarize_optimizer


class OptimizedRun(Run):
    """A run with an optimizer."""

    can_shard = True

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.weights_in_training = ExitStack()  # closing it leaves the model with the weights to evaluate and save

    @cached_property
    def optimizer(self) -> Optimizer:
        """The optimizer. Its learning rates are restored after the run, since it may be the user's own object."""
        config = self.config
        own, coupled = config.components.optimizer, config.coupled_beta2
        optimizer = make_optimizer(self.model, own, config.recipe, config.given, coupled, self._loss_module)
        if self.process_group.is_main:
            warn_of_untrained_loss(optimizer, config.components.loss_fn)
        scaler, is_sharded = self.accelerator.scaler, self.sharding is not None
        check_step(optimizer, scales_gradients=scaler is not None, is_sharded=is_sharded)
        self._inner.enter_context(preserve_learning_rates(optimizer))
        self.weights_in_training.enter_context(training_weights(optimizer))
        self._inner.callback(self.weights_in_training.close)
        return optimizer

    @property
    def _loss_module(self) -> nn.Module | None:
        """The loss over the window, if it is a module. The optimizer trains its parameters, too."""
        loss_fn = self.config.components.loss_fn
        return loss_fn if self.config.recipe.loss_over == "window" and isinstance(loss_fn, nn.Module) else None

    @property
    def optimizer_notes(self) -> list[str]:
        """The banner's lines about an optimizer or groups that are not the default."""
        recipe, own = self.config.recipe, self.config.components.optimizer
        has_groups = not isinstance(own, Optimizer)
        groups = describe_groups(parameter_groups(self.model, recipe, self._loss_module)) if has_groups else []
        if own is None and recipe.optimizer is None and not groups:
            return []
        scheduled = switches_weights(self.optimizer) and not recipe.lr_scheduler.startswith("constant")
        hint = ["Note: a schedule-free optimizer is meant for `lr_scheduler='constant'`"] if scheduled else []
        return [f"Optimizer: {summarize_optimizer(self.optimizer)}", *groups, *hint]

    @cached_property
    def gradients(self) -> GradientStrategy:
        if self.sharding is not None and self.call_order is not None:
            order = self.call_order
            return ShardedGradients(self.optimizer, self.sharding, self.process_group, lambda: order.names)
        return gradient_strategy(self.optimizer, in_float32=self.config.runtime.accumulate_in_fp32)

    def _prepare_model(self, stack: ExitStack) -> None:
        if self.accelerator.mixed_precision == "fp16" and not self.config.runtime.accumulate_in_fp32:
            refuse_float16(self.model)
        _ = self.optimizer  # must be made before the model moves to its device
        super()._prepare_model(stack)
        if self._loss_module is not None:
            self._loss_module.to(self.accelerator.device)
        known = set(self.model.parameters())
        if not self.process_group.is_single:
            broadcast_tensors(p for p in parameters_of(self.optimizer) if p not in known)
