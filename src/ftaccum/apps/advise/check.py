"""Run a check: print its cost, train its branches, and print what they say."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, DataError, SettingsError
from ...runtime.accelerator import check_processes, is_first_process, launched_state
from ...runtime.atomic_files import atomic_write
from ...runtime.run_dir import RunDir
from .branch import Branches
from .experiment import CELLS, Cell, Experiment
from .options import AdviseOptions
from .recorded_run import RecordedRun
from .statistics import Outcome, as_json, intervals_of, rows_of, table, verdict

# Time of a forward pass / time of a forward and a backward pass. The backward pass has about twice the operations of
# the forward pass (Kaplan et al. 2020, arXiv:2001.08361, section 2.1).
_EVALUATION = 1 / 3
_UNKNOWN_FOLDER = "If a path of the run is relative, start this command in the folder where the run was started."
_CAVEATS = (
    "This compares batches at equal rows, near one checkpoint and at constant rates. docs/noise_scale.md says what "
    "that leaves out."
)


def check_run(folder: Path, options: AdviseOptions, runtime: dict[str, Any]) -> bool:
    """Branch the run in a folder at several batches, and print their losses. Return whether all branches were trained.

    After Ctrl-C, the branches so far are printed. All processes must call this together; the first one prints.

    Raises:
        SettingsError: if the run cannot be branched, before any training.
        DataError: if its rows cannot be read.
    """
    check_processes(launched_state().num_processes)
    run = RecordedRun.read(folder, options.checkpoint)
    experiment = run.experiment(options.share, options.seeds)
    size = run.run_with["batch_size"] if options.batch_size is None else options.batch_size
    is_main, shows = is_first_process(), runtime["verbosity"] != "quiet"
    with _locked(folder) if is_main else nullcontext(), _working_folder(run):
        branches = Branches.load(run, experiment, runtime | {"batch_size": size})
        if is_main:
            print(describe(run, experiment, branches, size), flush=True)
        outcomes, is_complete = _train(branches, shows=is_main and shows)
    if is_main and outcomes:
        losses = table(intervals_of(outcomes), experiment, branches.measure)
        conclusion = verdict(outcomes, experiment, branches.measure, branches.n_measured)
        print("", losses, "", conclusion, _CAVEATS, sep="\n")
        if options.json is not None:
            values = {"run": str(folder), "checkpoint": run.checkpoint.path.name}
            values |= as_json(experiment, outcomes, branches.measure, branches.n_measured, conclusion)
            with atomic_write(Path(options.json).expanduser()) as partial:
                partial.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")
    return is_complete


def _train(branches: Branches, *, shows: bool) -> tuple[list[Outcome], bool]:
    """Train all branches, and return their outcomes, and whether Ctrl-C ended none of them."""
    outcomes: list[Outcome] = []
    todo = [(cell, number) for number in range(branches.experiment.seeds) for cell in CELLS]
    try:
        for cell, number in todo:
            outcomes.append(branches.train(cell, number))
            if shows:
                done, rows = f"branch {len(outcomes)} of {len(todo)}", f"{rows_of(branches.experiment.size(cell))}"
                last = outcomes[-1]
                loss = f"{branches.measure} {last.loss:.5g}, {last.seconds:.1f} s"
                print(f"{done}: {rows}, order {number + 1}: {loss}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        return outcomes, False
    return outcomes, True


def describe(run: RecordedRun, experiment: Experiment, branches: Branches, batch_size: int) -> str:
    """Return lines on what a check will do, and what it costs."""
    e, checkpoint = experiment, run.checkpoint.path.name
    whole, n = run.planned_rows, experiment.n_branches
    sizes = [f"{e.size(cell):,}" for cell in CELLS if cell.scaled]
    _, is_last = run.rates
    source = "of the last update" if is_last else "the mean over the run, because the schedule has decayed by then"
    if run.is_warming_up:
        source += ", inside the warm-up: a later checkpoint has the full rate"
    rows, passes = n * e.rows, sum(_passes(e, cell, batch_size) for cell in CELLS) * e.seeds
    seconds = run.seconds_of(rows + round(_EVALUATION * n * branches.n_measured))
    time = "in unknown time" if seconds is None else f"about {seconds:,.0f} s at the run's speed"
    if e.effective_batch_size != run.effective_batch_size:
        sizes[1] += f" (the run's {run.effective_batch_size:,} without the odd row)"
    return "\n".join(
        [
            f"Run: {run.folder}, continued after update {run.n_updates:,} ({checkpoint})",
            f"Branches: updates of {sizes[0]}, {sizes[1]} and {sizes[2]} rows, each over the same {e.rows:,} rows "
            f"({e.rows / whole:.1%} of the run's {whole:,}), in {e.seeds} orders",
            f"Learning rate: constant at {e.learning_rate:.3g} ({source}) for the run's batch; for the others "
            f"multiplied by {'√ratio' if e.rule == 'sqrt' else 'the ratio'} (scaled), and the same (unchanged)",
            f"Measured: {branches.measure} after the last row, on {rows_of(branches.n_measured)}"
            + ("; the run has trained on them in an earlier epoch" if branches.has_seen_measured else ""),
            f"Cost: {n} branches, {rows:,} rows ({rows / whole:.0%} of the run), about {passes:,} forward and backward "
            f"passes and {n} evaluations, {time}, besides starting {n} times",
        ]
    )


def _passes(experiment: Experiment, cell: Cell, batch_size: int) -> int:
    """Return about how many forward and backward passes a branch takes, on all processes together."""
    return experiment.updates(cell) * -(-experiment.size(cell) // batch_size)


@contextmanager
def _working_folder(run: RecordedRun) -> Iterator[None]:
    """Work in the folder that the run was started in, from which its relative paths start.

    Raises:
        SettingsError: if it no longer exists.
        DataError, SettingsError: those of the block, with a hint if the folder is not known.
    """
    here, there = Path.cwd(), Path(run.record.directory)
    if not there.is_dir():
        raise SettingsError(
            [
                f"The run in {str(run.folder)!r} was started in the folder {str(there)!r}, which does not exist here. "
                "Its model and its data may be named by paths that start there. Give `directory` in its run.json the "
                "folder that now has them."
            ]
        )
    os.chdir(there)  # an older version recorded no folder, and Path("") is the current one
    try:
        yield
    except (DataError, SettingsError) as error:
        if run.record.directory:
            raise
        hinted = f"{error} {_UNKNOWN_FOLDER}"
        raise (SettingsError([hinted]) if isinstance(error, SettingsError) else DataError(hinted)) from error
    finally:
        os.chdir(here)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other runs, which could remove the checkpoint, out of a folder.

    Raises:
        SettingsError: if a run uses the folder.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(RunDir(folder.absolute()).lock())
        except CheckpointError as error:
            running = f"The run in {str(folder)!r} is training at the moment."
            raise SettingsError([f"{running} Check it when it has ended or was interrupted."]) from error
        yield
