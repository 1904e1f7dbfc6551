"""The composition root: builds the components that training and verification share from a configuration.

Each component is built once, on first use, from the components that it depends on.
"""

from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import cached_property
from types import TracebackType
from typing import TypeVar

from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import SGD

from ..accumulation.accumulator import GradientAccumulator
from ..accumulation.buffers import SyncedBuffers
from ..data.iterable import open_stream
from ..planning.base_plan import BasePlan
from ..planning.batch_size import BatchSizes
from ..planning.micro_batches import MicroBatchPlanner
from ..planning.plan import Plan
from ..runtime.accelerator import accelerator_session
from ..runtime.gradients.plain import GradientStrategy
from ..runtime.library_output import library_bars
from ..runtime.log import logger, run_logging
from ..runtime.model_context import compile_model, model_context
from ..runtime.process_group import open_process_group, report_lost_process
from ..runtime.run_dir import RunDir
from ..runtime.sharding.launcher import find_sharding, ignored_modes, sharding_notes
from ..runtime.sharding.options import ShardingOptions
from ..runtime.sharding.shard import fits_whole
from ..runtime.sharding.units import CallOrder, candidate_units, observing
from .adapter_summary import summarize_adapters
from .adapters import added_adapters
from .build_data import TrainingData, build_data
from .build_plan import build_batch_sizes, build_planner, check_batch_sizes
from .build_sharding import check_sharding
from .config import RunConfig

RunType = TypeVar("RunType", bound="Run")


class Run:
    """The components of one run, as a context manager that restores the state of the model and the process on exit.

    Attributes:
        config: the arguments of the run.
        run_dir: the output folder, locked until exit; None if the run writes nothing.
        accelerator: the accelerator, set up for the requested precision and the launched processes.
        process_group: the processes of the run.
        sharding: how the model is sharded; None if each process holds all of it.
    """

    logs = True  # whether the run logs messages
    can_shard = False  # whether the model may be sharded; if not, each process holds all of it
    keeps_adapters = False  # whether adapters of `lora` stay in the model

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._outer, self._inner = ExitStack(), ExitStack()

    def __enter__(self: RunType) -> RunType:
        """Set up the processes, lock the output folder, add adapters and put the model in train mode.

        Raises:
            SettingsError, CheckpointError: if the processes, the precision or the folder are not available.
        """
        recipe, runtime = self.config.recipe, self.config.runtime
        self.run_dir = None if runtime.output_dir is None else RunDir.resolve(runtime.output_dir)
        with ExitStack() as stack:
            enter = stack.enter_context
            project_dir = None if self.run_dir is None else str(self.run_dir.path)
            self.accelerator = enter(accelerator_session(runtime, recipe.random_seed, project_dir))
            processes = self.accelerator.num_processes
            enter(report_lost_process(processes == 1, self.describe_progress))
            self.process_group = enter(open_process_group(processes))
            enter(run_logging(enabled=self.logs and self.process_group.is_main, verbosity=runtime.verbosity))
            enter(library_bars(shown=self.process_group.is_main and runtime.shows_bars))
            self.sharding = self._find_sharding()
            if (run_dir := self.run_dir) is not None:
                self.process_group.run_on_main(lambda: enter(run_dir.lock()))
            components, seed = self.config.components, recipe.random_seed
            model = enter(added_adapters(components.model, components.lora, seed, lambda: self.keeps_adapters))
            self.config = replace(self.config, components=replace(components, model=model))
            enter(self._inner)
            self._prepare_model(self._inner)
            self._outer = stack.pop_all()
        return self

    def _find_sharding(self) -> ShardingOptions | None:
        """Return how the run shards its model, if it does, and log what it does not take from the launcher."""
        runtime, processes = self.config.runtime, self.process_group.size
        if not self.can_shard:
            for note in ignored_modes():
                logger.info(note)
            return None
        options = find_sharding(runtime, processes)
        for note in sharding_notes(runtime, processes):
            logger.info(note)
        check_sharding(self.config.components, self.config.recipe, runtime, options)
        return options

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        try:
            return self._outer.__exit__(kind, error, trace)
        finally:
            # Components refer to each other in cycles, which would keep the model in memory until garbage collection.
            vars(self).clear()

    def describe_progress(self) -> str:
        """Return a description of the run's progress for the error message when another process is lost."""
        return ""

    @property
    def model(self) -> nn.Module:
        """The user's model, unwrapped; with `lora`, as a PEFT model."""
        return self.config.components.model

    @cached_property
    def data(self) -> TrainingData:
        """The rows, the loss and the loaders."""
        recipe, components = self.config.recipe, self.config.components
        check_batch_sizes(recipe, self.config.runtime, self.process_group.size)
        stream = open_stream(components.train_data, recipe.random_seed, self.process_group)
        with observing(self.call_order):
            return build_data(self.config, self.accelerator, self._inner.enter_context(stream))

    @cached_property
    def call_order(self) -> CallOrder | None:
        """The order in which the passes before training run the model's blocks; None if it is not sharded."""
        if self.sharding is None:
            return None
        return CallOrder(self.model, candidate_units(self.model, self.sharding.block_classes))

    @cached_property
    def batch_sizes(self) -> BatchSizes:
        """The resolved sizes of an update."""
        return self.new_batch_sizes()

    @property
    def adapter_notes(self) -> list[str]:
        """The line about the adapters, if the model has some."""
        summary = summarize_adapters(self.model)
        return [] if summary is None else [f"Adapters: {summary}"]

    def new_batch_sizes(self, known: int | None = None) -> BatchSizes:
        """Resolve the sizes of an update; measure the physical batch size if it is "auto".

        Args:
            known: the size that "auto" was resolved to earlier, if any.
        """
        return build_batch_sizes(
            self.config, self.data, self.accelerator, self.process_group, known, self._sharded_model
        )

    def _sharded_model(self) -> GradientStrategy | None:
        """Shard the model, if the run does, and return the strategy that has."""
        if self.sharding is None:
            return None
        self.gradients.shard(self.model, self.accelerator.device)
        return self.gradients

    @cached_property
    def planner(self) -> MicroBatchPlanner:
        """The planner that cuts windows into micro-batches.

        `WindowLoader.planner` starts as this one and gets smaller limits when memory runs out.
        """
        return build_planner(self.config.runtime, self.batch_sizes, self.data)

    @cached_property
    def plan(self) -> BasePlan:
        """The windows of the run."""
        return self.new_plan()

    def new_plan(self) -> BasePlan:
        """Return the windows of a run from its beginning."""
        data, n_validation = self.data, 0 if self.data.val_rows is None else len(self.data.val_rows)
        plan = data.train_rows.plan(self.config.recipe, self.batch_sizes, n_validation)
        return replace(plan, classes=data.classes) if isinstance(plan, Plan) else plan

    @cached_property
    def gradients(self) -> GradientStrategy:
        """The strategy that sums the gradients of a window."""
        return GradientStrategy(SGD(self.model.parameters()))  # a run that does not train never steps

    @cached_property
    def accumulator(self) -> GradientAccumulator:
        """The accumulator of a window's gradient."""
        return self.new_accumulator(self.prepared[0])

    @cached_property
    def prepared(self) -> tuple[nn.Module, AcceleratedOptimizer]:
        """The model and the optimizer, prepared for all processes: compiled, cast and synced as the settings say."""
        _ = self.data  # measures the loss, while the weights are whole
        if self.config.runtime.compile:
            self._inner.enter_context(compile_model(self.model))
        self._inner.callback(self.gradients.close)
        return self.gradients.prepare(self.accelerator, self.model)

    def independent_passes(self) -> AbstractContextManager[None]:
        """Return a context in which each process may run any number of passes without gradients."""
        return nullcontext() if self.sharding is None else self.gradients.independent_passes()

    def new_accumulator(self, wrapped: nn.Module, buffers: SyncedBuffers | None = None) -> GradientAccumulator:
        """Return an accumulator that has accumulated no window yet."""
        objective = self.data.objective
        return GradientAccumulator(self.accelerator, wrapped, objective, self.gradients, self.process_group, buffers)

    def _prepare_model(self, stack: ExitStack) -> None:
        """Move the model to its device and put it in train mode."""
        runtime = self.config.runtime
        if not getattr(self.model, "hf_device_map", None):  # a model spread over devices stays where it is
            self._place_model(stack)
        checkpoints = self.sharding is not None and self.sharding.checkpoints_activations  # by the launcher's file
        stack.enter_context(
            model_context(self.model, gradient_checkpointing=runtime.gradient_checkpointing or checkpoints)
        )

    def _place_model(self, stack: ExitStack) -> None:  # noqa: ARG002
        device = self.accelerator.device
        if self.sharding is None or fits_whole(self.model, device, self.process_group):  # else the host does
            self.model.to(device)
