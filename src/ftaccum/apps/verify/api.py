"""`verify`: what users call."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from ... import __version__
from ...data.collator import Collator
from ...data.dataset import Rows, as_rows, mean_length
from ...errors import DataError, SettingsError
from ...fields import find_faults, read_settings
from ...objective.deterministic_forward import DeterministicMode
from ...objective.forward import LossFn
from ...objective.item_counts import CountItems
from ...planning.batch_size import BatchSizes, batch_sizes_of
from ...planning.plan import Plan
from ...runtime.accelerator import accelerator_session
from ...runtime.memory import give_back_memory
from ...runtime.model_context import model_context
from ...runtime.process_group import ProcessGroup, open_process_group
from ...runtime.state_guards import cast_tensors, preserve_gradients
from ...settings import Recipe, Runtime, parse_settings
from ...training.build_data import TrainingData, build_data
from ...training.build_plan import fit_to_loss, micro_batch_planner
from ...training.components import Components, check_components
from .bench import Bench
from .compare import Comparison
from .precision import candidates, dtype_of, has_room, measured_in, said, tolerance_for
from .report import Verification
from .settings import VerifySettings

_FLOAT64 = 1e-12  # what rounding in float64 stays below
_ROWS = 1024  # to settle on how the loss is counted; of more, only those of the window are read and tokenised


def verify(
    model: nn.Module,
    data: Any = None,
    *,
    config: Any = None,
    batch_size: int = 4,
    gradient_accumulation_steps: int = 1,
    effective_batch_size: int | None = None,
    tokens_per_update: int | None = None,
    max_tokens: int | None = None,
    planner: bool = True,
    planner_costs: Sequence[float] | None = None,
    padding_free: bool = False,
    use_amp: bool = False,
    mixed_precision: str | None = None,
    gradient_checkpointing: bool = False,
    tokenizer: Any = None,
    data_collator: Collator | None = None,
    loss_fn: LossFn | None = None,
    reduction: str = "mean",
    count_items: CountItems | None = None,
    random_seed: int = 42,
    deterministic: bool = False,
    n_splits: int = 3,
    dtype: str | None = None,
    tolerance: float | None = None,
    progress: bool = True,
) -> Verification:
    """Sees whether accumulating is one large batch, on this model and these rows: by the gradients themselves.

    The rows of one update go through the model in one batch: its own mean loss, one forward and one backward pass. Then
    the same rows are accumulated by the code that trains, cut as in training, row by row, in random orders and sizes,
    and short as an epoch's last window is. In train mode, without dropout, which differs with the cut. Model,
    gradients, generators and the state of the process are left as they were.

    Args:
        data: rows, as `train_data` of `test_fine_tuning`. None: synthetic token ids below `config.vocab_size`.
        n_splits: cuts into random orders and sizes.
        dtype: "float64", "float32" or "model", as it is. None: float64, in which rounding hides nothing; where the
            model or memory does not allow it, float32; under autocast, as it is.
        tolerance: relative error up to which a gradient is exact. None: 4 times what rounding alone makes of one
            batch, its rows in another order and its loss times a third; within bounds that the precision sets.
        progress: show a progress bar.

    The other arguments are those of `test_fine_tuning`, and mean the same.

    Returns:
        The table and its verdict, on all processes the same; see `Verification`.

    Raises:
        SettingsError: arguments that cannot be used, all in one message, before anything is loaded.
        DataError: data that cannot be trained on.
        torch.OutOfMemoryError: where the rows of an update do not fit in memory together.

    Example:
        >>> print(verify(model, rows, batch_size=4, gradient_accumulation_steps=8))
    """
    rows = None if data is None else as_rows(data, "data")
    given = locals() | {"train_data": rows, "val_data": None, "optimizer": None, "compute_metrics": None}
    settings, recipe, runtime = _checked(given)
    components = Components(**{f.name: given[f.name] for f in fields(Components)})
    check_components(components, recipe, runtime)
    with accelerator_session(runtime, recipe.random_seed) as accelerator:
        return _verified(components, recipe, runtime, settings, accelerator)


def _checked(given: Mapping[str, Any]) -> tuple[VerifySettings, Recipe, Runtime]:
    settings = read_settings(VerifySettings, given)
    faults = find_faults(settings)
    # All rows train; what is inexact is told with the verdict.
    given = {**given, "validation_split": 0.0, "on_inexact": "ignore"}
    if settings.dtype == "float64":
        if given["use_amp"] or given["mixed_precision"] not in (None, "no"):
            faults.append("`dtype` is 'float64', which autocast leaves alone. Drop it, or give dtype='model'.")
        else:
            given["mixed_precision"] = "no"  # whatever `accelerate launch` was told
    if given["batch_size"] == "auto":
        faults.append("`batch_size` must be a number here: how a window is cut is what is verified. Give one.")
        given["batch_size"] = 1  # what else 'auto' would want is of no use here
    try:
        recipe, runtime = parse_settings(given)
    except SettingsError as error:
        raise SettingsError([*faults, *error.faults]) from error
    if faults:
        raise SettingsError(faults)
    return settings, recipe, runtime


def _verified(
    components: Components, recipe: Recipe, runtime: Runtime, settings: VerifySettings, accelerator: Accelerator
) -> Verification:
    started, model, processes = time.perf_counter(), components.model, accelerator.num_processes
    with ExitStack() as stack:
        process_group = stack.enter_context(open_process_group(accelerator.num_processes))
        stack.enter_context(preserve_gradients(model))
        if not getattr(model, "hf_device_map", None):  # a model that was spread over devices stays so
            stack.enter_context(cast_tensors([*model.parameters(), *model.buffers()], device=accelerator.device))
        stack.enter_context(model_context(model, gradient_checkpointing=runtime.gradient_checkpointing))
        if components.train_data is not None:
            components = replace(components, train_data=_some(components.train_data, recipe, runtime, processes))
        data = build_data(components, recipe, runtime, accelerator, stream=None)
        padded = data.train
        if runtime.padding_free:
            padded = build_data(
                components, recipe, replace(runtime, padding_free=False), accelerator, stream=None
            ).train
        length = mean_length(data.train_rows) if recipe.tokens_per_update else None
        stages = batch_sizes_of(recipe, runtime, processes, length).stages()
        batch_sizes = max((sizes for _, sizes in stages), key=lambda sizes: sizes.effective_batch_size)
        window = next(Plan(len(data.train_rows), 1, batch_sizes, recipe.random_seed).windows(0)).rows
        bench = Bench(accelerator, model, data.objective, data.train, padded, window, (recipe.random_seed, 0), None)
        dtype, notes = _settled(bench, components.loss_fn, settings.dtype, process_group)
        bench = replace(bench, dtype=dtype)
        stack.enter_context(measured_in(model, components.loss_fn, dtype))
        stack.enter_context(DeterministicMode.of(model, lambda: [bench.loss_of(bench.whole(window)).item()]).passes())
        precision = dtype or dtype_of(model), accelerator.mixed_precision
        report = data.objective.report
        comparison = Comparison(
            bench,
            process_group,
            micro_batch_planner(fit_to_loss(runtime, batch_sizes, report), batch_sizes),
            unit=batch_sizes.batch_size * processes,
            n_random=settings.n_splits,
            tolerance=lambda floor: settings.tolerance or tolerance_for(floor, *precision),
        )
        shown = accelerator.is_main_process and runtime.progress
        with tqdm(total=len(comparison.windows()), desc="windows", disable=not shown, leave=False) as bar:
            compared = comparison.results(bar.update)
    if len(stages) > 1:
        notes.append(
            f"Of the ks that training goes through, this is the largest: {batch_sizes.gradient_accumulation_steps}."
        )
    if precision[0] == torch.float64 and compared.floor > _FLOAT64:
        notes.append(
            "A part of the model computes in float32, whatever its weights are in: its rounding is what shows."
        )
    if compared.floor > compared.tolerance:
        notes.append(
            f"One batch against itself, its rows in another order, differs by {compared.floor:.1e}, which is more than "
            "counts as rounding: the table cannot tell. Does the model draw by itself (a generator of its own, "
            "checkpointing of its own around dropout)?"
        )
    return Verification(
        model=type(model).__name__,
        n_parameters=sum(p.numel() for p in model.parameters()),
        **vars(compared),
        dtype=str(precision[0]).removeprefix("torch."),
        autocast=precision[1],
        device=accelerator.device.type,
        counted_by=report.counted_by,
        reasons=report.inexact(),
        notes=[*_notes(data, batch_sizes, runtime, len(window)), *notes],
        batch_size=batch_sizes.batch_size,
        gradient_accumulation_steps=batch_sizes.gradient_accumulation_steps,
        num_processes=batch_sizes.num_processes,
        effective_batch_size=batch_sizes.effective_batch_size,
        random_seed=recipe.random_seed,
        versions={"ftaccum": __version__} | {name: version(name) for name in ("torch", "transformers", "accelerate")},
        seconds=round(time.perf_counter() - started, 3),
    )


def _some(train_data: Any, recipe: Recipe, runtime: Runtime, processes: int) -> Rows:
    """As many rows as are needed, by the seed: they may still have to be tokenised."""
    rows = as_rows(train_data, "data")
    if recipe.tokens_per_update:  # how many of them are an update hangs on the length of all
        return rows
    needed = max(_ROWS, batch_sizes_of(recipe, runtime, processes).effective_batch_size)
    order = np.random.RandomState(recipe.random_seed).permutation(len(rows))
    return rows.subset(np.sort(order[:needed]).tolist())


def _settled(
    bench: Bench, loss_fn: LossFn | None, wanted: str | None, process_group: ProcessGroup
) -> tuple[torch.dtype | None, list[str]]:
    """The first type that all processes can measure in, and what to say of those before it."""
    notes: list[str] = []
    *tries, last = candidates(bench.model, wanted, bench.accelerator.mixed_precision)
    for dtype in tries:
        reason = _why_not(bench, loss_fn, dtype)
        if not process_group.any(reason is not None):
            return dtype, notes
        name = str(dtype).removeprefix("torch.")
        notes.append(f"Not measured in {name}: {reason or 'another process cannot'}.")
    return last, notes


def _why_not(bench: Bench, loss_fn: LossFn | None, dtype: torch.dtype | None) -> str | None:
    """Why gradients cannot be had in this type; None where they can."""
    if not has_room(bench.model, dtype):
        return "the gradients would not fit in memory"
    try:
        with measured_in(bench.model, loss_fn, dtype), bench.from_the_start():
            replace(bench, dtype=dtype).together(bench.window)
    except DataError:
        raise
    except Exception as error:
        bench.model.zero_grad(set_to_none=True)
        give_back_memory()
        return f"{type(bench.model).__name__} cannot be run in it ({said(error)})"
    return None


def _notes(data: TrainingData, batch_sizes: BatchSizes, runtime: Runtime, n_rows: int) -> list[str]:
    """What to know of the rows and the ways to cut them."""
    objective, wanted = data.objective, batch_sizes.effective_batch_size
    padding = "Padding matters to this head: the rows of a window are padded to one width, in training as here."
    found = {
        "Data: SYNTHETIC random tokens, because there are none.": data.synthetic,
        f"An update wants {wanted} rows, and there are {n_rows}: these are the window.": n_rows < wanted,
        f"Micro-batches as trained: at most {runtime.max_tokens} tokens.": runtime.max_tokens is not None,
        objective.report.padding() or padding: objective.padding_sensitive,
    }
    return [note for note, holds in found.items() if holds]
