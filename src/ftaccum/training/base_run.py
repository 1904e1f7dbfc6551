"""The composition root: what training and verification have in common, built from a configuration.

Each part is built once, when it is first needed, from the parts that it needs.
"""

from contextlib import ExitStack
from functools import cached_property
from types import TracebackType
from typing import TypeVar

from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from ..accumulation.accumulator import GradientAccumulator
from ..accumulation.buffers import SyncedBuffers
from ..data.iterable import open_stream
from ..planning.base_plan import BasePlan
from ..planning.batch_size import BatchSizes
from ..planning.micro_batches import MicroBatchPlanner
from ..runtime.accelerator import accelerator_session
from ..runtime.gradients.plain import GradientStrategy
from ..runtime.log import run_logging
from ..runtime.model_context import compile_model, model_context
from ..runtime.process_group import open_process_group, report_lost_process
from ..runtime.run_dir import RunDir
from .build_data import TrainingData, build_data
from .build_plan import build_batch_sizes, build_planner, check_batch_sizes
from .config import RunConfig

RunType = TypeVar("RunType", bound="Run")


class Run:
    """The parts of one run. A context manager: leaving it gives the model and the process back as they were.

    Attributes:
        config: what the run is given.
        run_dir: the folder for its outputs, locked until the run is left; None where nothing is written.
        accelerator: of the wanted precision and the launched processes.
        process_group: those processes.
    """

    logs = True  # whether the run logs messages

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._outer, self._inner = ExitStack(), ExitStack()

    def __enter__(self: RunType) -> RunType:
        """Start the session, lock the output folder and put the model in train mode.

        Raises:
            SettingsError, CheckpointError: where the processes, the precision or the folder are not to be had.
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
            enter(run_logging(enabled=self.logs and self.process_group.is_main))
            if (run_dir := self.run_dir) is not None:
                self.process_group.run_on_main(lambda: enter(run_dir.lock()))
            enter(self._inner)
            self._prepare_model(self._inner)
            self._outer = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        try:
            return self._outer.__exit__(kind, error, trace)
        finally:
            # Parts refer to each other in circles, which would keep the model in memory until they are collected.
            vars(self).clear()

    def describe_progress(self) -> str:
        """Return what is known of the run where another process is lost, in sentences."""
        return ""

    @property
    def model(self) -> nn.Module:
        """The user's model, not wrapped."""
        return self.config.components.model

    @cached_property
    def data(self) -> TrainingData:
        """Rows, loss and loaders."""
        recipe, components = self.config.recipe, self.config.components
        check_batch_sizes(recipe, self.config.runtime, self.process_group.size)
        stream = open_stream(components.train_data, recipe.random_seed, self.process_group)
        return build_data(self.config, self.accelerator, self._inner.enter_context(stream))

    @cached_property
    def batch_sizes(self) -> BatchSizes:
        """The resolved sizes of an update."""
        return self.new_batch_sizes()

    def new_batch_sizes(self, known: int | None = None) -> BatchSizes:
        """Resolve the sizes of updates, and measure the physical batch where that is "auto".

        Args:
            known: what "auto" was found to be before.
        """
        return build_batch_sizes(self.config, self.data, self.accelerator, self.process_group, known)

    @cached_property
    def planner(self) -> MicroBatchPlanner:
        """What cuts windows into micro-batches; `WindowLoader.planner` follows it within the memory that there is."""
        return build_planner(self.config.runtime, self.batch_sizes, self.data.objective.report)

    @cached_property
    def plan(self) -> BasePlan:
        """The windows."""
        return self.new_plan()

    def new_plan(self) -> BasePlan:
        """Return the windows of a run from its beginning."""
        val_rows = self.data.val_rows
        return self.data.train_rows.plan(self.config.recipe, self.batch_sizes, 0 if val_rows is None else len(val_rows))

    @cached_property
    def gradients(self) -> GradientStrategy:
        """Where the gradients of a window are summed."""
        raise NotImplementedError

    @cached_property
    def accumulator(self) -> GradientAccumulator:
        """What accumulates the gradient of a window."""
        return self.new_accumulator(self.prepared[0])

    @cached_property
    def prepared(self) -> tuple[nn.Module, AcceleratedOptimizer]:
        """Model and optimizer as they run on all processes: compiled, cast and synced as the settings say."""
        if self.config.runtime.compile:
            self._inner.enter_context(compile_model(self.model))
        return self.gradients.prepare(self.accelerator, self.model)

    def new_accumulator(self, wrapped: nn.Module, buffers: SyncedBuffers | None = None) -> GradientAccumulator:
        """Return an accumulator that has seen no window yet."""
        objective = self.data.objective
        return GradientAccumulator(self.accelerator, wrapped, objective, self.gradients, self.process_group, buffers)

    def _prepare_model(self, stack: ExitStack) -> None:
        """Put the model on its device, in train mode."""
        runtime = self.config.runtime
        if not getattr(self.model, "hf_device_map", None):  # a model that was spread over devices stays so
            self._place_model(stack)
        stack.enter_context(model_context(self.model, gradient_checkpointing=runtime.gradient_checkpointing))

    def _place_model(self, stack: ExitStack) -> None:  # noqa: ARG002
        self.model.to(self.accelerator.device)
