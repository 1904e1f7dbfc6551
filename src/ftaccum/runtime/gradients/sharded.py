"""Gradients of weights that are sharded over the processes with FSDP2."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import AutocastKwargs
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ...errors import SettingsError
from ..log import logger
from ..memory import give_back_memory
from ..optimizers import inner_optimizers, place_state
from ..process_group import ProcessGroup
from ..sharding.gathers import GatherOrder
from ..sharding.layout import shard_like
from ..sharding.optimizer_check import check_optimizer
from ..sharding.options import ShardingOptions
from ..sharding.recast import RecastWeights
from ..sharding.shard import shard_model
from ..sharding.tensors import local_part
from ..sharding.units import weights_by_name
from ..sharding.used_weights import UsedWeights
from .fp32 import RoundingOptimizer, has_narrow_weights
from .plain import GradientStrategy
from .process_average import average_gradients

_NO_UNITS = (
    "No blocks of the model were found that can be gathered separately, so each process holds all weights during a "
    "pass. Blocks are the modules in a `ModuleList` that every pass runs once, in the same order."
)


class ShardedGradients(GradientStrategy):
    """Averaged gradients. Each process keeps its own shard.

    Each pass of a window reduces its gradients, so that none is ever whole; or only the last one does. The shards of
    16-bit gradients are summed in float32.
    """

    gathers_weights = True

    def __init__(
        self,
        optimizer: Optimizer,
        options: ShardingOptions,
        process_group: ProcessGroup,
        units: Callable[[], Sequence[str]],
    ) -> None:
        """Create a strategy.

        Args:
            units: returns the names of the modules to gather separately, in the order in which a pass runs them.
        """
        super().__init__(optimizer)
        self._options, self._process_group, self._units = options, process_group, units
        self._sums: RoundingOptimizer | None = None  # of 16-bit weights
        self._handles: list[RemovableHandle] = []

    def prepare(self, accelerator: Accelerator, model: nn.Module) -> tuple[nn.Module, AcceleratedOptimizer]:
        """Shard the model, if it is not sharded yet. Return it without DDP, and the optimizer."""
        self.shard(model, accelerator.device)
        optimizer = accelerator.prepare_optimizer(self._sums or self._optimizer, device_placement=False)
        # Autocast would cache 16-bit copies of all weights until the end of a forward pass.
        accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        # Accelerate leaves DDP out in "evaluation mode".
        return accelerator.prepare_model(model, device_placement=False, evaluation_mode=True), optimizer

    def shard(self, model: nn.Module, device: torch.device) -> None:
        """Shard a model in place, with the main process's weights, and let the optimizer hold the shards."""
        if self._handles:
            return
        check_optimizer(self._optimizer, device, self._process_group)
        whole = weights_by_name(model)
        names = self._process_group.broadcast(list(self._units()))
        if not names and self._process_group.is_main:
            logger.warning(_NO_UNITS)
        units = shard_model(model, names, device, self._options)
        assert isinstance(model, FSDPModule)
        _replace_parameters(self._optimizer, whole, weights_by_name(model))
        _refuse_gradients(whole, weights_by_name(model))
        place_state(self._optimizer)
        self._model, self._names = model, {p: name for name, p in model.named_parameters()}
        self._order, self._used = GatherOrder(model, units, self._process_group), UsedWeights(model, units)
        self._handles = [*self._order.install(), *self._used.install(model)]
        if has_narrow_weights(self._optimizer):
            self._sums = RoundingOptimizer(self._optimizer)

    def close(self) -> None:
        """Remove the hooks of the run from the model, which stays sharded."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            self._used.close()

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        with warnings.catch_warnings(), RecastWeights(self._used.gathered).saved():
            # Of the whole model, whose outputs need no gather in the backward pass.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
            yield

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        return super().parameters if self._sums is None else list(self._sums.sums.values())

    @property
    def weights(self) -> Sequence[nn.Parameter]:
        return super().parameters if self._sums is None else list(self._sums.sums)

    def begin_pass(self, *, is_last: bool, counts: bool) -> None:
        self._order.begin_pass()
        self._used.is_recording = counts
        if not self._options.syncs_each_pass:
            self._model.set_requires_gradient_sync(is_last)

    def catch_up(self) -> None:
        give_back_memory()  # which the gathers need, if it has run out
        self._order.catch_up()

    def check_backward(self, loss: Tensor) -> None:
        self._order.check_backward(loss)

    def end_pass(self) -> None:
        if self._sums is not None:
            for p in self._sums.sums:
                if isinstance(p, DTensor):  # others are summed after the window
                    self._sums.add(p)

    def run_together(self, forward: Callable[[], Tensor]) -> Tensor | None:
        self.begin_pass(is_last=True, counts=True)
        loss = super().run_together(forward)
        if loss is None:
            self.catch_up()
        if self._process_group.any(loss is None):
            self.reset()
            return None
        return loss

    def reset(self) -> None:
        self._order.reset()
        self._used.forget()

    def independent_passes(self) -> AbstractContextManager[None]:
        return self._order.independent_passes()

    def reduce(self, process_group: ProcessGroup) -> None:
        """Average what FSDP2 does not shard, and leave weights that no process has used without a gradient."""
        used = self._used.agreed(process_group)
        average_gradients([p for p in self.weights if not isinstance(p, DTensor)], process_group)
        for p, holder in zip(self.weights, self.parameters, strict=True):
            if isinstance(p, DTensor) and self._names.get(p) not in used:
                holder.grad = None
            elif holder is not p and not isinstance(p, DTensor) and p.grad is not None:
                assert self._sums is not None
                self._sums.add(p)

    def show(self) -> None:
        if self._sums is not None:
            self._sums.round()

    def clip(self, max_norm: float) -> Tensor:
        """Clip the window's gradient to a total norm over all processes, and return the norm before clipping."""
        gradients = [(p.grad, local_part(p.grad)) for p in self.parameters if p.grad is not None]
        sharded = [part for gradient, part in gradients if isinstance(gradient, DTensor)]
        whole = [part for gradient, part in gradients if not isinstance(gradient, DTensor)]
        device = self._device
        squares = _sum_of_squares(sharded, device)
        distributed.all_reduce(squares)
        norm = (squares + _sum_of_squares(whole, device)).sqrt()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for part in (*sharded, *whole):
            part.mul_(factor.to(part.device, part.dtype))
        return norm

    @property
    def _device(self) -> torch.device:
        return self._order.device


def _sum_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the sum of the squares of all numbers, a float64 scalar: the square of a float32 norm may overflow."""
    norms = [torch.linalg.vector_norm(t).to(device, torch.float64) for t in tensors]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64, device=device)


def _replace_parameters(optimizer: Optimizer, before: dict[str, nn.Parameter], after: dict[str, nn.Parameter]) -> None:
    """Let an optimizer, and those that it contains, hold the sharded parameters in place of the whole ones."""
    sharded = {id(p): after[name] for name, p in before.items()}
    for each in (optimizer, *inner_optimizers(optimizer)):
        for group in each.param_groups:
            group["params"] = [sharded.get(id(p), p) for p in group["params"]]
        for p in [p for p in each.state if id(p) in sharded]:  # some make state before their first step
            after_p, values = sharded[id(p)], each.state.pop(p)
            each.state[after_p].update({name: shard_like(value, after_p) for name, value in values.items()})


def _refuse_gradients(before: dict[str, nn.Parameter], after: dict[str, nn.Parameter]) -> None:
    """Raise SettingsError in a backward pass that reaches a whole weight, which no optimizer holds any more."""
    for name, p in before.items():
        if p is not after[name] and p.requires_grad:
            p.register_hook(partial(_refuse_gradient, name))


def _refuse_gradient(name: str, _: Tensor) -> None:
    raise SettingsError(
        [
            f"The model is sharded, but the loss uses a whole copy of the weight `{name}`, as it was before sharding. "
            "The loss function or the model keeps the parameter outside of the model's modules, such as in a list or "
            "in a variable. Let it use the module that holds the weight, or set `sharding='off'`."
        ]
    )
