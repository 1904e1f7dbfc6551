"""Where a run goes on from, if anywhere."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..memory import Agreement
from ..planning import Course, Plan
from ..settings import Recipe, Runtime
from .manifest import damage
from .matching import check, of_recipe
from .shelf import Shelf
from .state import Checkpoint, RunState

Tell = Callable[[str], None]


@dataclass
class Resumption:
    """A checkpoint to go on from, or none, for a run that starts anew.

    Attributes:
        allowed: names of what may differ from the run that the checkpoint is of.
    """

    checkpoint: Checkpoint | None
    allowed: tuple[str, ...] = ()
    _changed: set[str] = field(default_factory=set)

    @classmethod
    def found(cls, runtime: Runtime, recipe: Recipe, agreement: Agreement, tell: Tell) -> "Resumption":
        """What `resume` asks for. All processes call it alike.

        Raises:
            CheckpointError: on all processes, where a folder that is named has no sound checkpoint, or one of a run
                with another Recipe; and where not all processes can see it.
        """
        if runtime.resume is None:
            return cls(None)
        path = agreement.from_main(lambda: _path(runtime, tell))
        if path is None:
            return cls(None)
        if agreement.any(not path.is_dir()):
            raise CheckpointError(
                [
                    f"`resume` found {path}, which not all processes can see. Have `output_dir` on a disk that all "
                    "machines share."
                ]
            )
        resumption = cls(Checkpoint.opened(path), tuple(runtime.allow_changed))
        resumption._check("recipe", of_recipe(recipe))  # before anything is loaded
        return resumption

    @property
    def path(self) -> Path | None:
        return None if self.checkpoint is None else self.checkpoint.path

    def sized(self, runtime: Runtime) -> Runtime:
        """With the physical batch that "auto" was found to be: it is not tried again."""
        if self.checkpoint is None or runtime.batch_size != "auto":
            return runtime
        return replace(runtime, batch_size=self.checkpoint.facts["runs"]["batch_size"])

    def going_on(self, plan: Course, facts: dict[str, Any]) -> Course:
        """The windows of a run that goes on behind those that are done.

        Args:
            facts: of this run, as its own checkpoints are going to say them.

        Raises:
            CheckpointError: where it is not the run that the checkpoint is of.
        """
        if self.checkpoint is None:
            return plan
        self._check("on", facts["on"])
        if not isinstance(plan, Plan):
            return plan
        return plan.going_on([entry.rows for entry in self.checkpoint.windows], self.checkpoint.facts["n_rows"])

    def put_back(self, state: RunState) -> None:
        """Has a run that is ready for its first window be where the checkpoint was taken."""
        if self.checkpoint is not None:
            state.put_back(self.checkpoint, self._changed)

    def put_back_generators(self, state: RunState, seed: int) -> None:
        """The last thing before the next window: whatever came before may have drawn."""
        if self.checkpoint is not None:
            state.put_back_generators(self.checkpoint, seed)

    def in_words(self, facts: dict[str, Any]) -> str | None:
        """What is told of a run that goes on: from where, and what is other than it was."""
        if self.checkpoint is None:
            return None
        was, now = self.checkpoint.facts["runs"], facts["runs"]
        sentence = (
            f"Goes on after update {len(self.checkpoint.windows)}, from {self.path}: "
            f"{self.checkpoint.facts['rows']} rows are done, none is left out and none comes again."
        )
        if self._changed:
            sentence += f" Allowed to differ: {', '.join(sorted(self._changed))}."
        others = [f"{name} {now[name]} (it was {was[name]})" for name in now if was.get(name) != now[name]]
        if others:
            draws = ", and dropout draws anew" if any(was[n] != now[n] for n in ("processes", "device")) else ""
            sentence += f" Run otherwise: {', '.join(others)}; sums are rounded otherwise{draws}."
        return sentence

    def _check(self, kind: str, now: dict[str, Any]) -> None:
        assert self.checkpoint is not None, "there is something to compare with"
        self._changed |= check(self.checkpoint.facts[kind], now, self.allowed, self.checkpoint.path)


def _path(runtime: Runtime, tell: Tell) -> Path | None:
    if runtime.resume == "auto":
        assert runtime.output_dir is not None, "checked with the settings"
        shelf = Shelf(Path(runtime.output_dir))
        there, path = shelf.checkpoints(), shelf.newest_sound(tell)
        if there and path is None:
            tell("None of the checkpoints is sound: the run starts anew.")
        return path
    named = Path(str(runtime.resume))
    if (named / "checkpoints").is_dir():
        path, wrong = Shelf(named).newest_sound(tell), "has no sound checkpoint"
    else:
        fault = damage(named) if named.is_dir() else "there is no such folder"
        path, wrong = (None if fault else named), f"is no checkpoint that can be gone on from: {fault}"
    if path is None:
        raise CheckpointError(
            [
                f"`resume` is {str(named)!r}, which {wrong}. Name the folder of a checkpoint, or of a run that has "
                "some, or give 'auto'."
            ]
        )
    return path
