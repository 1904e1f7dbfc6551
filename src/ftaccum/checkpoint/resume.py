"""Where a run goes on from, if anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError

from ..errors import CheckpointError
from ..planning.base_plan import BasePlan
from ..runtime.log import logger
from ..runtime.process_group import ProcessGroup
from ..runtime.run_dir import RunDir
from ..settings import Recipe, Runtime
from ..tracking.ledger import EpochEntry
from ..tracking.metrics_logger import within
from .compatibility import FORMAT, RunIdentity, check, recipe_identity
from .directory import CheckpointDirectory
from .format import Checkpoint
from .manifest import damage
from .state import TrainState

# Where one of these differs, the rows that are done are no part of this run's order, and some may come again.
_OTHER_ROWS = {"train_data", "random_seed"}


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to resume from, or none, for a run that starts anew.

    Attributes:
        allowed: names of what may differ from the run that the checkpoint is of.
        damaged: newer checkpoints that were passed over for it.
        changed: names of what differs, as far as it has been compared.
    """

    checkpoint: Checkpoint | None
    allowed: tuple[str, ...] = ()
    damaged: tuple[Path, ...] = ()
    changed: frozenset[str] = frozenset()

    @classmethod
    def find(
        cls, recipe: Recipe, runtime: Runtime, directory: CheckpointDirectory | None, process_group: ProcessGroup
    ) -> "ResumePoint":
        """Find what `resume` asks for. All processes call it alike.

        Args:
            directory: of the run's own checkpoints.

        Raises:
            CheckpointError: on all processes, where a folder that is named has no sound checkpoint, or one of a run
                with another Recipe; and where not all processes can see it.
        """
        if (resume := runtime.resume) is None:
            return cls(None)
        path, damaged = process_group.run_on_main(lambda: _find(resume, directory))
        if path is None:
            return cls(None, damaged=damaged)
        if process_group.any(not path.is_dir()):
            raise CheckpointError(
                [
                    f"`resume` found {path}, which not all processes can see. Have `output_dir` on a disk that all "
                    "machines share."
                ]
            )
        checkpoint, allowed = _opened(path), tuple(runtime.allow_changed)
        _check_ended(checkpoint, allowed)
        changed = check(checkpoint.metadata["recipe"], recipe_identity(recipe), allowed, path)  # before data are loaded
        return cls(checkpoint, allowed, damaged, frozenset(changed))

    @property
    def path(self) -> Path | None:
        return None if self.checkpoint is None else self.checkpoint.path

    @property
    def batch_size(self) -> int | None:
        """The physical batch of that run, which is not measured again where it was "auto"."""
        return None if self.checkpoint is None else self.checkpoint.metadata["run_with"]["batch_size"]

    def resume_plan(self, plan: BasePlan, identity: RunIdentity) -> "tuple[BasePlan, ResumePoint]":
        """Return the windows of this run and the point to continue from, after the windows that the checkpoint holds.

        Raises:
            CheckpointError: where this is not the run of the checkpoint, or a stream in updates of another size.
        """
        checkpoint = self.checkpoint
        if checkpoint is None:
            return plan, self
        differ = check(checkpoint.metadata["trained_on"], identity.trained_on, self.allowed, checkpoint.path)
        if not plan.can_resize and "effective_batch_size" in differ:
            raise CheckpointError(
                [
                    f"`resume` found {self.path}, with updates of another size, and a stream can only be read again in "
                    "updates of the size that it was read in. Give the same `effective_batch_size`, or start anew "
                    "(`resume=None`)."
                ]
            )
        plan, epoch = plan.resume_after(checkpoint.progress)
        return plan, replace(self, checkpoint=_reopened(checkpoint, epoch), changed=self.changed | differ)

    def restore(self, state: TrainState) -> None:
        """Has a run that is ready for its first window be where the checkpoint was taken.

        Raises:
            CheckpointError: where the files are sound, and hold something else than a checkpoint of this version.
        """
        if self.checkpoint is None:
            return
        try:
            state.restore(self.checkpoint, self.changed)
        except (OSError, ValueError, TypeError, KeyError, EOFError, UnpicklingError, SafetensorError) as error:
            raise _unreadable(self.checkpoint.path, error) from error

    def restore_generators(self, state: TrainState, seed: int) -> None:
        """The last thing before the next window: whatever came before may have drawn."""
        if self.checkpoint is not None:
            state.restore_generators(self.checkpoint, seed)

    def describe(self, identity: RunIdentity, n_windows: int) -> str | None:
        """Return a message on where the run resumes and what differs from before; None where it starts anew.

        Args:
            n_windows: of the whole run.
        """
        if self.checkpoint is None:
            return None
        if (
            len(self.checkpoint.windows) >= n_windows
            and len(self.checkpoint.epochs) > self.checkpoint.windows[-1].epoch
        ):
            return (
                f"This run has ended, with update {len(self.checkpoint.windows)} ({self.path}): there is nothing left "
                "to train. A larger `n_epochs`, named in `allow_changed`, extends it."
            )
        was, now = self.checkpoint.metadata["run_with"], identity.run_with
        sentence = (
            f"Goes on after update {len(self.checkpoint.windows)}, from {self.path}: "
            f"{self.checkpoint.metadata['rows']} rows are done"
        )
        sentence += "." if self.changed & _OTHER_ROWS else ", and no row is skipped or repeated."
        if self.changed:
            sentence += f" Allowed to differ: {', '.join(sorted(self.changed))}."
        others = [f"{name} {now[name]} (it was {was[name]})" for name in now if was.get(name) != now[name]]
        if others:
            draws = ", and dropout draws anew" if any(was[n] != now[n] for n in ("processes", "device")) else ""
            sentence += f" Run otherwise: {', '.join(others)}; sums are rounded otherwise{draws}."
        before, here = self.checkpoint.metadata["versions"], identity.versions
        if moved := [
            f"{name} {here[name]} (it was {before.get(name)})" for name in here if before.get(name) != here[name]
        ]:
            sentence += f" Of other versions: {', '.join(moved)}; numbers may differ in the last digits."
        return sentence


def _check_ended(checkpoint: Checkpoint, allowed: Sequence[str]) -> None:
    """Refuse to resume a run that its numbers have ended, unless something has changed: else starting it again and
    again would step over one bad update after another."""
    ended = checkpoint.metadata["extra_state"]["nonfinite"]["ended"]
    if ended and not allowed:
        raise CheckpointError(
            [
                f"`resume` found {checkpoint.path}, of a run that was ended at update {len(checkpoint.windows)}, "
                f"which was not finite: {ended} To go on behind that, name in `allow_changed` what you have "
                "changed (`['train_data']` for rows that were fixed)."
            ]
        )


def _reopened(checkpoint: Checkpoint, epoch: int) -> Checkpoint:
    """Return a checkpoint without the end of an epoch that continues: `max_updates`, say, had cut it off, and allows
    for more now."""
    if len(checkpoint.epochs) <= epoch:
        return checkpoint
    kept = [entry for entry in checkpoint.entries if not isinstance(entry, EpochEntry) or entry.epoch < epoch]
    saved = checkpoint.metadata["extra_state"]
    extra_state = saved | {"metrics_logger": within(saved["metrics_logger"], epoch)}
    return replace(checkpoint, entries=kept, metadata=checkpoint.metadata | {"extra_state": extra_state})


def _find(resume: str, directory: CheckpointDirectory | None) -> tuple[Path | None, tuple[Path, ...]]:
    """Return a checkpoint, and newer ones that are damaged."""
    damaged: list[Path] = []
    if resume == "auto":
        assert directory is not None, "`output_dir` is checked with the settings"
        path, damaged = directory.newest_sound()
        if path is None and directory.checkpoints():
            logger.warning("None of the checkpoints is sound: the run starts anew.")
        return path, tuple(damaged)
    named = Path(resume).expanduser()
    if RunDir(named).checkpoints.is_dir():
        (path, damaged), wrong = (
            CheckpointDirectory(RunDir(named).checkpoints).newest_sound(),
            "has no sound checkpoint",
        )
    else:
        fault = _fault(named)
        path, wrong = (None if fault else named), f"is no checkpoint that can be gone on from: {fault}"
    if path is None:
        raise CheckpointError(
            [
                f"`resume` is {str(named)!r}, which {wrong}. Name the folder of a checkpoint, or of a run that has "
                "some, or give 'auto'."
            ]
        )
    return path, tuple(damaged)


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
            raise ValueError(f"its format is {checkpoint.metadata.get('format')!r}, and not {FORMAT}")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from error
    return checkpoint


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        [
            f"`resume` found {path}, which cannot be read: {error}. It may be of another version of ftaccum. Go on "
            "with the version that wrote it, name another checkpoint, or start anew (`resume=None`)."
        ]
    )
