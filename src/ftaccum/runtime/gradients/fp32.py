"""Gradients of 16-bit weights, summed in float32."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer, SparseAdam
from torch.utils.hooks import RemovableHandle

from ...errors import SettingsError
from ..gradient_hooks import AnyLayoutHook
from ..optimizers import inner_optimizers, parameters_of, place_state
from ..process_group import ProcessGroup
from ..sharding.tensors import local_part
from ..tensor_collectives import broadcast_tensors
from .plain import GradientStrategy
from .process_average import average_gradients, dense_zeros


def gradient_strategy(optimizer: Optimizer, *, in_float32: bool) -> GradientStrategy:
    """Return a strategy for an optimizer: float32 sums if requested and any weight is narrower, else autograd's own.

    Raises:
        SettingsError: if float32 sums are requested for SparseAdam.
    """
    narrow = has_narrow_weights(optimizer)
    if in_float32 and narrow and any(isinstance(o, SparseAdam) for o in (optimizer, *inner_optimizers(optimizer))):
        raise SettingsError(
            [
                "`accumulate_in_fp32` is True, which makes gradients dense, but SparseAdam takes sparse ones only. "
                "Leave `accumulate_in_fp32` out, or use another optimizer."
            ]
        )
    return Fp32Gradients(optimizer) if in_float32 and narrow else GradientStrategy(optimizer)


class Fp32Gradients(GradientStrategy):
    """Float32 sums for 16-bit weights, rounded only once, when the optimizer takes its step.

    A bfloat16 sum has 8 bits of precision: when 64 gradients are added one by one, the last ones hardly count. Autograd
    cannot do better, because `param.grad` has the dtype of the weights. So a hook adds each gradient to a float32 sum
    as soon as it is complete, and clears it. A sum takes 4 bytes per weight instead of 2. The model runs without DDP,
    which would reduce only the 16-bit gradient of the last pass. This also saves DDP's buckets of 2 bytes per weight.
    """

    reduces_after_passes = True
    _optimizer: "RoundingOptimizer"

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(RoundingOptimizer(optimizer))
        self._hooks: dict[nn.Parameter, RemovableHandle] | None = None  # None outside of an epoch

    @property
    def weights(self) -> Sequence[nn.Parameter]:
        return list(self._optimizer.sums)

    def prepare(self, accelerator: Accelerator, model: nn.Module) -> tuple[nn.Module, AcceleratedOptimizer]:
        """Return the model without DDP, and the optimizer. Copy process 0's weights to all others, as DDP would."""
        if accelerator.num_processes > 1:
            broadcast_tensors(model.parameters())
        place_state(self._optimizer.wrapped)
        optimizer = accelerator.prepare_optimizer(self._optimizer, device_placement=False)
        # Accelerate leaves DDP out in "evaluation mode".
        return accelerator.prepare_model(model, evaluation_mode=True), optimizer

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        self._hooks = {}
        try:
            yield
        finally:
            for hook in self._hooks.values():
                hook.remove()
            self._hooks = None

    def begin_window(self) -> None:
        self._optimizer.cover_all()
        if self._hooks is None:
            return
        add = AnyLayoutHook(self._optimizer.add)
        for p in self._optimizer.sums:
            if p.requires_grad and p not in self._hooks:
                self._hooks[p] = p.register_post_accumulate_grad_hook(add)

    def reduce(self, process_group: ProcessGroup) -> None:
        """Average the sums over all processes."""
        average_gradients(list(self._optimizer.sums.values()), process_group)

    def show(self) -> None:
        self._optimizer.round()


class RoundingOptimizer(Optimizer):
    """An optimizer over float32 stand-ins for 16-bit weights.

    Code that unscales, clips or steps sees float32 parameters with float32 gradients. The wrapped optimizer gets these
    gradients rounded to the dtype of its weights.

    Attributes:
        wrapped: the wrapped optimizer, which takes the step.
        sums: maps each weight to its stand-in, which has the weight's shape, no memory of that size, and the sum as its
            `grad`.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.wrapped = optimizer
        self._is_rounded = False
        self.sums: dict[nn.Parameter, nn.Parameter] = {p: _stand_in(p) for p in _trained(optimizer)}
        super().__init__(self.sums.values(), {})

    def cover_all(self) -> None:
        """Add a stand-in for each weight that was unfrozen, or added to the wrapped optimizer, since the last call."""
        for p in _trained(self.wrapped):
            if p not in self.sums:
                self.sums[p] = _stand_in(p)
                self.param_groups[0]["params"].append(self.sums[p])

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        def evaluate() -> Any:
            self._drop()
            loss = closure()
            self._round()
            return loss

        shown, self._is_rounded = self._is_rounded, False
        if not shown:
            self._round()
        self.wrapped.step(None if closure is None else evaluate)
        if not shown:  # else the caller looks at the gradients, and drops them
            self._drop()

    def round(self) -> None:
        """Set the rounded sums as gradients of the weights now, and not again in the next step."""
        self._round()
        self._is_rounded = True

    def add(self, p: nn.Parameter) -> None:
        """Add a weight's gradient, if it has one, to its float32 sum, and clear it.

        The gradient of an embedding table may be sparse.
        """
        found, total = p.grad, self.sums[p]
        if found is None:
            return
        p.grad = None
        if found.is_sparse:
            rows = dense_zeros(total) if total.grad is None else total.grad
            total.grad = rows.index_add_(0, found._indices()[0], found._values().to(total.dtype))
        elif total.grad is None:
            total.grad = found.to(total.dtype).contiguous()
        else:
            total.grad += found

    def _drop(self) -> None:
        for p in self.sums:
            p.grad = None

    def _round(self) -> None:
        """Set the rounded sums as gradients of the weights."""
        for p, total in self.sums.items():
            p.grad = None if total.grad is None else _rounded(total.grad, p)
            total.grad = None  # freed one by one, so that memory never holds both copies in full


def has_narrow_weights(optimizer: Optimizer) -> bool:
    """Return whether an optimizer trains weights of 16 bits."""
    return any(p.dtype != _wide(p) for p in _trained(optimizer))


def _trained(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for p in parameters_of(optimizer) if p.requires_grad]


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _stand_in(p: Tensor) -> nn.Parameter:
    zeros = torch.zeros((), dtype=_wide(p), device=p.device).expand(local_part(p).shape)
    if isinstance(p, DTensor):
        zeros = DTensor.from_local(
            zeros, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )
    return nn.Parameter(zeros)


def _rounded(total: Tensor, p: Tensor) -> Tensor:
    """Return a gradient with the dtype and strides of `p`.

    Numbers beyond the range of the dtype become its largest one, not infinity: the check for finite gradients has
    already passed.
    """
    limit = torch.finfo(p.dtype).max
    return torch.empty_like(p).copy_(total.clamp_(-limit, limit))
