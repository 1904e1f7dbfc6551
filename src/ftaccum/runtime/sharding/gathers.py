"""The gathers of sharded weights, which all processes must make in the same order, whatever rows they run.

A process gathers the weights of a unit when its forward pass reaches the unit, and waits until the others gather the
same unit. A unit that only some processes run, or a pass that fails on one, would block them all.

- In training, all processes run the same number of passes. `GatherOrder` makes each pass gather all units in one order:
  a unit that the rows of a process skip is gathered and synced all the same, with zero gradients.
- Without gradients, processes may run different numbers of passes, and of other lengths, as in generation. Inside
  `independent_passes`, they agree before each gather on the unit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from ...errors import DataError
from ..graph_leaves import nodes_of
from ..process_group import ProcessGroup


class GatherOrder:
    """Makes each pass of a sharded model gather all units, in one order."""

    def __init__(self, model: FSDPModule, units: Sequence[FSDPModule], process_group: ProcessGroup) -> None:
        """Args:
        model: the sharded model.
        units: its units, in the order in which a pass runs them.
        """
        self._model, self._units, self._process_group = model, list(units), process_group
        self._names = {module: name for name, module in model.named_modules()}  # type: ignore[attr-defined]
        self._next = 0  # the place of the next unit that the current pass may run
        self._gathered = 0  # how many units the current pass has gathered
        self._has_root = False  # whether the current pass has gathered the weights outside of the units
        self._is_independent = False
        self._arguments: Any = None  # of the unit that runs
        self._outputs: list[list[Any]] = [[] for _ in units]  # of each unit in this pass, as nodes of its graph

    @property
    def device(self) -> torch.device:
        """The device that gathers."""
        state: Any = self._model
        return state._get_fsdp_state()._device

    def install(self) -> list[RemovableHandle]:
        """Add the hooks that keep the order to the model, and return their handles."""
        root: Any = self._model
        root._get_fsdp_state()._lazy_init()  # a process may fail before its first forward pass
        handles = [
            root.register_forward_pre_hook(self._begin, prepend=True),  # before FSDP's own hook
            root.register_forward_pre_hook(self._gathered_root),  # after it
            root.register_forward_hook(self._end, prepend=True),  # before FSDP's own hook
        ]
        for place, unit in enumerate(self._units):
            module: Any = unit
            handles.append(module.register_forward_pre_hook(self._before(place), prepend=True, with_kwargs=True))
            handles.append(module.register_forward_pre_hook(partial(self._after_gather, place), with_kwargs=True))
            handles.append(module.register_forward_hook(_without_views, prepend=True))
            handles.append(module.register_forward_hook(partial(self._ran, place), with_kwargs=True))
        return handles

    def begin_pass(self) -> None:
        """Begin a pass of training."""
        self._next, self._gathered, self._has_root = 0, 0, False
        self._forget_outputs()

    def check_backward(self, loss: Tensor) -> None:
        """Check that the backward pass of a loss gathers the same units on all processes.

        Raises:
            DataError: on all processes, if the loss depends on the output of a unit on some of them only.
        """
        reached = _reached(loss, self._outputs)
        self._forget_outputs()
        flags = self._process_group.any_of([*reached, *(not flag for flag in reached)])
        for place, on_some in enumerate(flags[: len(reached)]):
            if on_some and flags[len(reached) + place]:
                raise DataError(_dependency_message(self._names[self._units[place]]))

    def catch_up(self) -> None:
        """Gather the units that a failed forward pass has not reached, for which other processes wait."""
        self._forget_outputs()
        if not self._has_root:
            self._model.unshard()
        for place in range(self._gathered, len(self._units)):
            self._gather(place)
        self._gathered, self._has_root = len(self._units), True

    def reset(self) -> None:
        """Forget the passes of a window that all processes have abandoned, and gradients that are not reduced yet."""
        self._model.reset_iter_state()
        for module in (self._model, *self._units):
            state: Any = module._get_fsdp_state()
            for p in (p for group in state._fsdp_param_groups for p in group.fsdp_params):
                p.unsharded_accumulated_grad = None
                if hasattr(p, "_unsharded_param"):
                    p._unsharded_param.grad = None

    @contextmanager
    def independent_passes(self) -> Iterator[None]:
        """Let each process run any number of passes without gradients, until all have left the context."""
        self._model.unshard()  # stays so, for passes that begin inside the model, as in `generate` of PEFT
        self._is_independent = True
        try:
            yield
        finally:
            while (place := self._process_group.min(None)) is not None:
                self._gather(place)
            self._is_independent = False
            self.reset()

    def _forget_outputs(self) -> None:
        for nodes in self._outputs:  # they keep the activations of the pass in memory
            nodes.clear()

    def _ran(self, place: int, module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        if in_backward() or self._is_independent:
            return
        self._outputs[place] += _nodes(outputs)
        before, self._arguments = self._arguments, None
        if before is not None and _seen((args, kwargs)) != before:
            raise DataError(_changes_arguments(self._names[module]))

    def _begin(self, *_: Any) -> None:
        if not in_backward():
            self.begin_pass()

    def _gathered_root(self, *_: Any) -> None:
        self._has_root = True

    def _after_gather(self, place: int, _: nn.Module, args: Any, kwargs: Any) -> None:
        if not in_backward():
            self._gathered, self._arguments = place + 1, _seen((args, kwargs))

    def _before(self, place: int) -> Callable[..., Any]:
        """Return the hook before the unit at a place of the order."""

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if in_backward():  # gradient checkpointing runs the unit again
                return None
            if self._is_independent:
                self._agree_on(place)
                return None
            if place < self._next:
                raise DataError(_order_message(self._names[module]))
            skipped = self._units[self._next : place]
            self._next = place + 1
            return self._skip(skipped, (args, kwargs)) if skipped else None

        return hook

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, _: nn.Module, __: Any, outputs: Any) -> Any:
        if in_backward() or self._is_independent:
            return None
        skipped, self._next = self._units[self._next :], len(self._units)
        return self._skip(skipped, outputs) if skipped else None

    def _skip(self, units: Sequence[FSDPModule], values: Any) -> Any:
        """Lead values through units that the pass skips, without a change."""
        for unit in units:
            values = self._pass_through(unit, values)
        return values

    def _pass_through(self, unit: Any, values: Any) -> Any:
        """Lead the tensors of nested values through a unit that the pass skips, without a change.

        The unit gathers its weights in the forward pass and again in the backward pass, and reduces zero gradients, in
        step with the processes that run it. This calls FSDP's hooks alone: the module would also call those that the
        user has added, which may change the values.
        """
        flat, structure = tree_flatten(values)
        places = [n for n, value in enumerate(flat) if isinstance(value, Tensor) and value.is_floating_point()]
        if any(flat[n].requires_grad for n in places):
            places = [n for n in places if flat[n].requires_grad]
        trains = any(p.requires_grad for p in unit.parameters())
        if trains and not places and torch.is_grad_enabled():
            raise DataError(_no_tensors_message(self._names[unit], values))
        state = unit._get_fsdp_state()
        inputs, _ = state._pre_forward(unit, tuple(flat[n] for n in places), {})
        self._gathered += 1
        outputs = _same(inputs, trains)
        outputs = state._post_forward(unit, inputs, outputs)
        self._outputs[self._gathered - 1] += _nodes(outputs)
        for n, value in zip(places, outputs, strict=True):
            flat[n] = value
        return tree_unflatten(flat, structure)

    def _agree_on(self, place: int) -> None:
        """Gather with the other processes whatever they need first, until all gather the unit at `place`."""
        self._units[place].reshard()  # a failed pass may have left it gathered
        while (first := self._process_group.min(place)) != place:
            assert first is not None
            self._gather(first)

    def _gather(self, place: int) -> None:
        """Gather a unit that other processes run, and free it again."""
        self._units[place].reshard()
        self._units[place].unshard()
        self._units[place].reshard()


def _without_views(_: nn.Module, __: Any, outputs: Any) -> Any:
    """Copy outputs that are views: changing one in place (`x += y`) would remove the hook of its backward pass."""
    flat, structure = tree_flatten(outputs)
    if not any(_is_view(value) for value in flat):
        return None
    return tree_unflatten([value.clone() if _is_view(value) else value for value in flat], structure)


def _is_view(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and value._base is not None


def _seen(arguments: Any) -> tuple[list[int], Any] | None:
    """Return the ids and the structure of the arguments of a unit; None if FSDP2 has not copied their containers."""
    flat, structure = tree_flatten(arguments)
    copied = torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in flat)
    return ([id(value) for value in flat], structure) if copied else None


def _changes_arguments(name: str) -> str:
    return (
        f"`{name}` changes a list or a dictionary among its arguments. With `sharding`, a block gets copies of them, "
        "so the change would be lost. Let the block return the new values, or set `sharding='off'`."
    )


def _nodes(outputs: Any) -> list[Any]:
    """Return the nodes of the graph that compute the tensors of nested outputs."""
    flat, _ = tree_flatten(outputs)
    return [value.grad_fn for value in flat if isinstance(value, Tensor) and value.grad_fn is not None]


def _reached(loss: Tensor, outputs: Sequence[Sequence[Any]]) -> list[bool]:
    """Return for each group of nodes whether the graph of a loss has one of them."""
    missing = {node for nodes in outputs for node in nodes}
    for node in nodes_of(loss):
        missing.discard(node)
        if not missing:
            break
    return [any(node not in missing for node in nodes) for nodes in outputs]


def in_backward() -> bool:
    """Return whether a backward pass is running: gradient checkpointing runs forward passes in it."""
    return torch._C._current_graph_task_id() != -1


def _same(tensors: tuple[Tensor, ...], trains: bool) -> tuple[Tensor, ...]:
    """Return copies of tensors that have a gradient wherever those of a unit that trains have one."""
    if trains and torch.is_grad_enabled() and not any(t.requires_grad for t in tensors):
        return tuple(t.detach().requires_grad_() for t in tensors)
    return tuple(t.clone() for t in tensors)


def _no_tensors_message(name: str, values: Any) -> str:
    return (
        f"A pass skips the block `{name}`. `sharding` then needs a tensor to lead through it, but finds none in "
        f"{type(values).__name__}. Let the model return a tensor, tuple, dict or `ModelOutput`, or set "
        "`sharding='off'`."
    )


def _dependency_message(name: str) -> str:
    return (
        f"The loss depends on the output of `{name}` on some processes, but not on others. `sharding` gathers the "
        "weights of this block in the backward pass of all processes or of none. Let every loss depend on it, such as "
        "by adding 0 times the sum of the output, or set `sharding='off'`."
    )


def _order_message(name: str) -> str:
    return (
        f"`sharding` gathers the weights of `{name}` once per pass, but a pass has run it twice, or after a block that "
        "follows it. Run the blocks in one order, set `sharding='off'`, or name the classes of other blocks in a "
        "config file of `accelerate launch` (`fsdp_transformer_layer_cls_to_wrap`)."
    )
