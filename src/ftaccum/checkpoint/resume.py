"""Find the checkpoint that a run resumes from, check it, and restore it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError

from ..errors import CheckpointError
from ..planning.base_plan import BasePlan
from ..runtime.log import logger
from ..runtime.process_group import ProcessGroup
from ..runtime.run_dir import RunDir
from ..settings.recipe import Recipe
from ..settings.runtime import Runtime
from ..tracking.ledger import Entry, EpochEntry, EvaluationEntry
from ..tracking.metrics_logger import within
from ..tracking.run_record import RunRecord
from ..tracking.selection import Criterion
from .compatibility import FORMAT, RunIdentity, check, recipe_identity
from .directory import CheckpointDirectory
from .format import Checkpoint
from .manifest import damage
from .state import TrainState

# If one of these differs, the rows are in another order, and rows that are done may be repeated.
_OTHER_ROWS = {"train_data", "random_seed", "sampler"}
# If one of these differs, so do the passes, and dropout draws other numbers.
_DRAWING = {"processes", "device", "batch_size", "max_tokens", "planner", "planner_costs", "loss_head"}


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run resumes from, or None for a new run.

    Attributes:
        allowed: names of what may differ from the checkpoint's run.
        damaged: newer checkpoints that were skipped because they are damaged.
        changed: names of the differences found so far.
    """

    checkpoint: Checkpoint | None
    allowed: tuple[str, ...] = ()
    damaged: tuple[Path, ...] = ()
    changed: frozenset[str] = frozenset()

    @classmethod
    def find(
        cls, recipe: Recipe, runtime: Runtime, directory: CheckpointDirectory | None, process_group: ProcessGroup
    ) -> "ResumePoint":
        """Find the checkpoint that the setting `resume` refers to. All processes must call this together.

        Args:
            directory: the folder of the run's own checkpoints.

        Raises:
            CheckpointError: on all processes, if a named folder has no sound checkpoint, if the run has finished and
                has none, if the checkpoint's run had another Recipe, or if not all processes can see the checkpoint.
        """
        if (resume := runtime.resume) is None:
            return cls(None)
        path, damaged = process_group.run_on_main(lambda: _find(resume, directory))
        if path is None:
            return cls(None, damaged=damaged)
        if process_group.any(not path.is_dir()):
            raise CheckpointError(
                [
                    f"`resume` found {path}, which not all processes can see. Put `output_dir` on a disk that all "
                    "machines share."
                ]
            )
        checkpoint, allowed = _opened(path), tuple(runtime.allow_changed)
        _check_ended(checkpoint, allowed)
        changed = check(checkpoint.metadata["recipe"], recipe_identity(recipe), allowed, path)  # before data is loaded
        return cls(checkpoint, allowed, damaged, frozenset(changed))

    @property
    def path(self) -> Path | None:
        return None if self.checkpoint is None else self.checkpoint.path

    @property
    def batch_size(self) -> int | None:
        """Physical batch of the checkpoint's run, so that "auto" is not measured again."""
        return None if self.checkpoint is None else self.checkpoint.metadata["run_with"]["batch_size"]

    def resume_plan(
        self, plan: BasePlan, identity: RunIdentity, is_due: Callable[[int, int], bool]
    ) -> "tuple[BasePlan, ResumePoint]":
        """Return the plan and the resume point of this run, which continues after the checkpoint's windows.

        Args:
            is_due: returns whether an evaluation is due after a number of updates, given the number at the last one.

        Raises:
            CheckpointError: if this run differs from the checkpoint's run in what must not change, or reads a stream in
                updates of another size.
        """
        checkpoint = self.checkpoint
        if checkpoint is None:
            return plan, self
        differ = check(checkpoint.metadata["trained_on"], identity.trained_on, self.allowed, checkpoint.path)
        if not plan.can_resize and "effective_batch_size" in differ:
            raise CheckpointError(
                [
                    f"`resume` found {self.path}, whose updates have another size. On a stream, the size of an update "
                    "cannot change. Use the same `effective_batch_size`, or start a new run (`resume=None`)."
                ]
            )
        plan, epoch = plan.resume_after(checkpoint.progress)
        changed = self.changed | differ
        # Without a change, the run has ended, or had ended an epoch with its last update.
        drops = bool(changed) and not is_due(len(checkpoint.windows), _previous_evaluation(checkpoint))
        return plan, replace(self, checkpoint=_reopened(checkpoint, epoch, drops), changed=changed)

    def restore(self, state: TrainState, criterion: Criterion) -> None:
        """Restore the checkpoint, if any, into a run that is ready for its first window.

        Args:
            criterion: decides which evaluation so far is the best.

        Raises:
            CheckpointError: if the files are undamaged, but are not a checkpoint of this version.
        """
        if self.checkpoint is None:
            return
        best = criterion.best(self.checkpoint.evaluations)
        try:
            state.restore(self.checkpoint, self.changed)
            state.restore_best(self.checkpoint, best, self.changed)
        except (OSError, ValueError, TypeError, KeyError, EOFError, UnpicklingError, SafetensorError) as error:
            raise _unreadable(self.checkpoint.path, error) from error

    def restore_generators(self, state: TrainState, seed: int) -> None:
        """Restore the random generators. Call this right before the next window: other steps may draw numbers."""
        if self.checkpoint is not None:
            state.restore_generators(self.checkpoint, seed)

    def describe(self, identity: RunIdentity, n_windows: int) -> str | None:
        """Return a message on where the run resumes and what has changed; None for a new run.

        Args:
            n_windows: number of windows in the whole run.
        """
        if self.checkpoint is None:
            return None
        if (
            len(self.checkpoint.windows) >= n_windows
            and len(self.checkpoint.epochs) > self.checkpoint.windows[-1].epoch
        ):
            return (
                f"This run already ended with update {len(self.checkpoint.windows)} ({self.path}). To extend it, "
                "raise `n_epochs` and name it in `allow_changed`."
            )
        was, now = self.checkpoint.metadata["run_with"], identity.run_with
        sentence = (
            f"Resuming after update {len(self.checkpoint.windows)}, from {self.path}: "
            f"{self.checkpoint.metadata['rows']} rows are done"
        )
        unit = "draw" if self.checkpoint.metadata["recipe"].get("sampler") == "balanced" else "row"
        sentence += "." if self.changed & _OTHER_ROWS else f", and no {unit} is skipped or repeated."
        if self.changed:
            sentence += f" Changes allowed by `allow_changed`: {', '.join(sorted(self.changed))}."
        differ = [name for name in now if name in was and was[name] != now[name]]  # an older version has fewer
        if others := [f"{name} {now[name]} (was {was[name]})" for name in differ]:
            draws = ", and dropout draws differ" if _DRAWING & {*differ} else ""
            sentence += f" Changed settings: {', '.join(others)}. Sums may round differently{draws}."
        before, here = self.checkpoint.metadata["versions"], identity.versions
        if moved := [
            f"{name} {here[name]} (was {before.get(name)})" for name in here if before.get(name) != here[name]
        ]:
            sentence += f" Changed versions: {', '.join(moved)}. Numbers may differ in the last digits."
        return sentence


def _check_ended(checkpoint: Checkpoint, allowed: Sequence[str]) -> None:
    """Refuse to resume a run that non-finite updates ended, unless a change is allowed.

    Otherwise, restarting the run repeatedly would skip bad updates one by one.
    """
    ended = checkpoint.metadata["extra_state"]["nonfinite"]["ended"]
    if ended and not allowed:
        raise CheckpointError(
            [
                f"`resume` found {checkpoint.path}, but that run ended at update {len(checkpoint.windows)}, whose loss "
                f"or gradient was not finite: {ended} To continue after it, fix the cause and name in `allow_changed` "
                "what you have changed (`['train_data']` for fixed rows)."
            ]
        )


def _previous_evaluation(checkpoint: Checkpoint) -> int:
    """Return the number of updates at the last evaluation before that of the last update."""
    updates = [entry.evaluation for entry in checkpoint.evaluations]
    return max((n for n in updates if n < len(checkpoint.windows)), default=0)


def _reopened(checkpoint: Checkpoint, epoch: int, drops_evaluation: bool) -> Checkpoint:
    """Return a checkpoint without the end of an epoch that now continues, for example because `max_updates` cut the
    epoch off and has been raised.

    Args:
        drops_evaluation: whether to drop the evaluation after the last update, too: a longer run would not have it.
    """
    if len(checkpoint.epochs) <= epoch:
        return checkpoint
    last = len(checkpoint.windows)
    drops = drops_evaluation and any(entry.evaluation == last for entry in checkpoint.evaluations)

    def stays(entry: Entry) -> bool:
        if isinstance(entry, EvaluationEntry):
            return not (drops and entry.evaluation == last)
        return not isinstance(entry, EpochEntry) or entry.epoch < epoch

    saved = checkpoint.metadata["extra_state"]
    extra_state = saved | {"metrics_logger": within(saved["metrics_logger"], epoch, drops_evaluation=drops)}
    entries = [entry for entry in checkpoint.entries if stays(entry)]
    return replace(checkpoint, entries=entries, metadata=checkpoint.metadata | {"extra_state": extra_state})


def _find(resume: str, directory: CheckpointDirectory | None) -> tuple[Path | None, tuple[Path, ...]]:
    """Return the checkpoint to resume from, if any, and newer damaged checkpoints."""
    damaged: list[Path] = []
    if resume == "auto":
        assert directory is not None, "`output_dir` is checked with the settings"
        path, damaged = directory.newest_sound()
        if path is None:
            _refuse_finished(RunDir(directory.folder.parent), n_damaged=len(damaged))
        if path is None and directory.checkpoints():
            logger.warning("None of the checkpoints is sound. Starting a new run.")
        return path, tuple(damaged)
    named = Path(resume).expanduser()
    if not RunDir(named).checkpoints.is_dir():
        _refuse_finished(RunDir(named))
    if RunDir(named).checkpoints.is_dir():
        (path, damaged), wrong = (
            CheckpointDirectory(RunDir(named).checkpoints).newest_sound(),
            "has no sound checkpoint",
        )
    else:
        fault = _fault(named)
        path, wrong = (None if fault else named), f"is not a checkpoint to resume from: {fault}"
    if path is None:
        raise CheckpointError(
            [
                f"`resume` is {str(named)!r}, which {wrong}. Set it to 'auto', or to the folder of a checkpoint or of "
                "a run that has checkpoints."
            ]
        )
    return path, tuple(damaged)


def _refuse_finished(run_dir: RunDir, n_damaged: int = 0) -> None:
    """Raise CheckpointError if the run in a folder without sound checkpoints has finished.

    Otherwise, a new run would replace its model.
    """
    record = RunRecord.read(run_dir.record)
    if record is None or not record.finished:
        return
    if n_damaged:
        why = "its checkpoints are damaged"
    elif record.keep_checkpoints:
        why = "its checkpoint was removed"
    else:
        why = "it kept no checkpoint, because `keep_checkpoints` was 0"
    raise CheckpointError(
        [
            f"`resume` asks to continue the run in {str(run_dir.path)!r}, but that run has finished and cannot be "
            f"extended: {why}. Start a new run: with `resume=None`, which replaces its model, or in another "
            "`output_dir`."
        ]
    )


def _fault(named: Path) -> str | None:
    if not named.is_dir():
        return "there is no such folder"
    try:
        return damage(named)
    except OSError as error:
        return f"it cannot be read ({error})"


def _opened(path: Path) -> Checkpoint:
    try:
        checkpoint = Checkpoint.opened(path)
        if checkpoint.metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {checkpoint.metadata.get('format')!r} instead of {FORMAT}")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from error
    return checkpoint


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    if isinstance(error, CheckpointError):
        return CheckpointError(error.faults)
    found = f"`resume` found {path}, which cannot be read: {error}. Another version of ftaccum may have written it."
    remedy = "Resume with that version, name another checkpoint, or start a new run (`resume=None`)."
    return CheckpointError([f"{found} {remedy}"])
