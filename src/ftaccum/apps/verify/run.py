"""The run of a verification. It is built like a training run, but measures instead of training."""

import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import nn
from torch.optim import SGD

from ...checkpoint.compatibility import package_versions
from ...data.convert import as_rows
from ...data.loader import Loader
from ...errors import DataError, SettingsError
from ...objective.deterministic_forward import DeterministicMode
from ...objective.rounding import Rounding
from ...planning.batch_size import BatchSizes, batch_sizes_of
from ...planning.micro_batches import RowIndices
from ...planning.plan import Plan
from ...runtime.gradients.plain import GradientStrategy
from ...runtime.memory import give_back_memory, is_out_of_memory
from ...runtime.progress_bar import can_draw_bars, tqdm
from ...runtime.state_guards import cast_tensors, preserve_gradients, preserve_problem_type
from ...training.base_run import Run
from ...training.build_data import build_data
from ...training.config import RunConfig
from ...training.parameter_groups import trainable_parameters
from .bench import Bench
from .compare import Compared, Comparison
from .precision import candidates, dtype_of, has_room, measured_in, shown
from .rare_rows import Traits, rarest, traits_of, with_rare_rows
from .reference import Reference
from .report import Verification
from .settings import VerifySettings

_FLOAT64 = 1e-12  # upper bound of rounding errors in float64
_ROWS = 1024  # enough to find how the loss is counted; more are read and tokenized only if the window needs them
_RARE = 64  # further rows to keep, for label values or columns that the others lack
_SHARDED = (
    "The launcher asks for FSDP, but `verify` measures a whole model on each process. Start it with `torchrun`, with "
    "another config file of `accelerate launch`, or on a single process."
)


class VerificationRun(Run):
    """A run that accumulates one window in many ways. It restores the model, including its gradients."""

    can_shard = True  # finds out whether training would, which is refused below

    def __init__(self, config: RunConfig, settings: VerifySettings) -> None:
        super().__init__(config)
        self._settings = settings
        self._traits: Traits = ()

    def verify(self) -> Verification:
        """Measure, and return the table and its verdict, the same on all processes."""
        started = time.perf_counter()
        if self.config.components.train_data is not None:
            self._take_rows()
        drawn = next(Plan(len(self.data.train_rows), 1, self.batch_sizes, self._seed).windows(0)).rows
        window = with_rare_rows(drawn, self._traits, self._seed)
        seed = (self._seed, 0)
        over_window = self.config.recipe.loss_over == "window"
        reference = Reference(
            self.config.components, self.data.train_rows, seed, self.accelerator.device, self.data.loss_fn, over_window
        )
        bench = Bench(self, self._trained, reference, self._padded_loader, window, seed, None)
        dtype, notes = self._choose_dtype(bench)
        bench = replace(bench, dtype=dtype)
        precision = dtype or dtype_of(self.model), self.accelerator.mixed_precision
        with self._measured_in(dtype):
            bench = self._that_fits(bench)
            mode = DeterministicMode.of(self.model, lambda: [bench.loss()])
            with mode.passes():
                compared = self._compare(bench, precision)
        return self._verification(
            compared,
            precision,
            [*self._notes(drawn, window, len(bench.window)), *notes, *_doubts(compared, precision[0])],
            started,
        )

    @cached_property
    def gradients(self) -> GradientStrategy:
        model, *losses = self._trained
        of_loss = [p for loss in losses for p in loss.parameters() if p.requires_grad]
        return GradientStrategy(SGD([*trainable_parameters(model), *of_loss]))  # it never steps

    @cached_property
    def batch_sizes(self) -> BatchSizes:
        """The sizes of the largest update in training."""
        return max((sizes for _, sizes in self.all_batch_sizes.stages()), key=lambda sizes: sizes.effective_batch_size)

    @cached_property
    def all_batch_sizes(self) -> BatchSizes:
        return self.new_batch_sizes()

    @property
    def _trained(self) -> list[nn.Module]:
        """The modules whose gradients are compared: the model, and a loss over the window with parameters."""
        loss_fn = self.config.components.loss_fn
        if self.config.recipe.loss_over == "window" and isinstance(loss_fn, nn.Module):
            return [self.model, loss_fn]
        return [self.model]

    def _measured_in(self, dtype: torch.dtype | None) -> AbstractContextManager[None]:
        components = self.config.components
        return measured_in(self.model, dtype, components.loss_fn, components.loss_inputs)

    @property
    def _seed(self) -> int:
        return self.config.recipe.random_seed

    @cached_property
    def _padded_loader(self) -> Loader:
        """The loader of training, with `padding_free` off."""
        if not self.config.runtime.padding_free:
            return self.data.train
        runtime = replace(self.config.runtime, padding_free=False)
        return build_data(replace(self.config, runtime=runtime), self.accelerator, None).train

    def _prepare_model(self, stack: ExitStack) -> None:
        if self.sharding is not None:
            raise SettingsError([_SHARDED])
        for module in self._trained:
            stack.enter_context(preserve_gradients(module))
        stack.enter_context(preserve_problem_type(self.model))
        super()._prepare_model(stack)

    def _place_model(self, stack: ExitStack) -> None:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        stack.enter_context(cast_tensors(tensors, device=self.accelerator.device))

    def _take_rows(self) -> None:
        """Keep only as many rows as are needed, drawn by the seed, because they may still have to be tokenized."""
        components, recipe, size = self.config.components, self.config.recipe, self.config.runtime.batch_size
        rows = as_rows(components.train_data, "data")
        assert isinstance(size, int), "checked with the arguments"
        if not recipe.tokens_per_update:  # otherwise an update depends on the lengths of all rows
            needed = max(_ROWS, batch_sizes_of(recipe, size, self.process_group.size).effective_batch_size)
            order = np.random.RandomState(self._seed).permutation(len(rows))
            kept = order[:needed].tolist()
            rows = rows.subset(sorted([*kept, *rarest(traits_of(rows), _RARE, kept)]))
        self._traits = traits_of(rows)
        self.config = replace(self.config, components=replace(components, train_data=rows))

    def _choose_dtype(self, bench: Bench) -> tuple[torch.dtype | None, list[str]]:
        """Return the first type that all processes can measure in, and notes on the types that failed before."""
        notes: list[str] = []
        *tries, last = candidates(self.model, self._settings.dtype, self.accelerator.mixed_precision)
        for dtype in tries:
            reason = self._why_not(bench, dtype)
            if not self.process_group.any(reason is not None):
                return dtype, notes
            name = str(dtype).removeprefix("torch.")
            notes.append(f"Not measured in {name}: {reason or 'another process cannot'}.")
        return last, notes

    def _why_not(self, bench: Bench, dtype: torch.dtype | None) -> str | None:
        """Return why gradients cannot be computed in this type; None if they can."""
        if not has_room(self.model, dtype):
            return "the gradients would not fit in memory"
        try:
            with self._measured_in(dtype), bench.from_the_start():
                replace(bench, dtype=dtype).together(bench.window)
        except DataError:
            raise
        except Exception as error:
            bench.taken()
            give_back_memory()
            return f"{type(self.model).__name__} cannot run in this type ({shown(error)})"
        return None

    def _that_fits(self, bench: Bench) -> Bench:
        """Halve the window until one batch of it fits in the memory of all processes.

        Raises:
            torch.OutOfMemoryError: if a single row does not fit.
        """
        while True:
            failed: Exception | None = None
            try:
                bench.together(bench.window)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                failed = error.with_traceback(None)  # a traceback would keep tensors of the pass
            if not self.process_group.any(failed is not None):
                return bench
            bench.taken()
            give_back_memory()
            if len(bench.window) == 1:
                raise torch.OutOfMemoryError(f"A single row does not fit in memory. The device reported: {failed}")
            bench = replace(bench, window=bench.window[: len(bench.window) // 2])

    def _compare(self, bench: Bench, precision: tuple[torch.dtype, str]) -> Compared:
        given, (dtype, autocast) = self._settings.tolerance, precision
        comparison = Comparison(
            bench,
            self.planner,
            unit=self.batch_sizes.batch_size * self.process_group.size,
            n_random=self._settings.n_splits,
            tolerance=lambda floor: given or Rounding.of([dtype], autocast).tolerance(floor),
        )
        shown = self.process_group.is_main and self.config.runtime.shows_bars and can_draw_bars()
        with tqdm(total=len(comparison.windows()), desc="windows", disable=not shown, leave=False) as bar:
            return comparison.results(bar.update)

    def _notes(self, drawn: RowIndices, window: RowIndices, n_fitting: int) -> list[str]:
        """Return notes on the rows and on how they are split.

        Args:
            drawn: the window that the seed draws.
            window: the same window after rare rows replaced some of its rows.
            n_fitting: number of its rows that fit in one batch.
        """
        n_rows, n_rare = len(window), len(set(window).difference(drawn))
        objective, wanted = self.data.objective, self.batch_sizes.effective_batch_size
        max_tokens, k = self.planner.limits.tokens, self.batch_sizes.gradient_accumulation_steps
        padding = "Padding changes this head's loss, so the rows of a window are padded to one width, as in training."
        notes = {
            "Data: SYNTHETIC random tokens, because no data was given.": self.data.synthetic,
            f"An update has {wanted} rows, but only {n_rows} rows are given. These are verified.": n_rows < wanted,
            f"Replaced {n_rare} of the rows by rows with rare label values or columns.": n_rare > 0,
            f"One batch of the {n_rows} rows of an update does not fit in memory, so only {n_fitting} of them are "
            "verified. Errors that only occur with more rows are not found.": n_fitting < n_rows,
            f"Micro-batches as trained: at most {max_tokens} tokens.": max_tokens is not None,
            objective.report.padding() or padding: objective.padding_sensitive,
            f"`gradient_accumulation_steps` changes during training. The largest value, {k}, is verified.": bool(
                self.all_batch_sizes.later
            ),
        }
        return [*self.adapter_notes, *self.data.text_notes, *(note for note, holds in notes.items() if holds)]

    def _verification(
        self, compared: Compared, precision: tuple[torch.dtype, str], notes: list[str], started: float
    ) -> Verification:
        report, sizes = self.data.objective.report, self.batch_sizes
        return Verification(
            model=type(self.model).__name__,
            n_parameters=sum(p.numel() for p in self.model.parameters()),
            **vars(compared),
            dtype=str(precision[0]).removeprefix("torch."),
            autocast=precision[1],
            device=self.accelerator.device.type,
            counted_by="all rows of an update together" if report.window else report.counted_by,
            reasons=report.inexact(),
            notes=notes,
            batch_size=sizes.batch_size,
            gradient_accumulation_steps=sizes.gradient_accumulation_steps,
            num_processes=sizes.num_processes,
            effective_batch_size=sizes.effective_batch_size,
            random_seed=self._seed,
            versions=package_versions(),
            loss_over=self.config.recipe.loss_over,
            seconds=round(time.perf_counter() - started, 3),
        )


def _doubts(compared: Compared, dtype: torch.dtype) -> list[str]:
    """Return notes on the limits of the measurement."""
    doubts = []
    if dtype == torch.float64 and compared.floor > _FLOAT64:
        doubts.append(
            "Part of the model computes in float32 although its weights are float64, so the errors include float32 "
            "rounding."
        )
    if compared.floor > compared.tolerance:
        doubts.append(
            f"One batch and the same batch with its rows reversed differ by {compared.floor:.1e}, which is more than "
            "counts as rounding, so the table is not conclusive. Does the model use its own random generator, or its "
            "own checkpointing around dropout?"
        )
    return doubts
