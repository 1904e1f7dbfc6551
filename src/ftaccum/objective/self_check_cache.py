"""A cache of verdicts of the self-check, as small JSON files."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..runtime.atomic_files import atomic_write
from ..runtime.log import logger
from .probe import EXPLAINED
from .report import ExactnessReport

_VERSION = 3
_MOST_BYTES = 10_000  # an entry has about 200


@dataclass(frozen=True)
class Verdict:
    """The verdict on a loss that is one mean, and that accumulates exactly.

    Attributes:
        way: the name of the way to count.
        measured: whether there were several ways to choose from.
        shifts: whether logits predict the next label.
        longest: the positions of the longest row that was run.
        at_labels: whether logits at labelled positions were enough for loss and gradient.
        gives_logits: whether the model then returns the outputs of its head unchanged, as logits.
        whole: a hash of the whole rows whose loss the way to count explains, if it was measured on cut ones.
    """

    way: str
    measured: bool
    shifts: bool
    longest: int
    at_labels: bool = False
    gives_logits: bool = False
    whole: str = ""

    @classmethod
    def of(cls, report: ExactnessReport, longest: int) -> "Verdict | None":
        """Return the verdict of a report; None if it is about anything but one exact mean by a named count."""
        way = next(iter(report.ways.values()), "")
        return cls(way, report.measured, report.shifts, longest) if is_plain(report) else None


def is_plain(report: ExactnessReport) -> bool:
    """Return whether a report is about one exact mean by a named count, and nothing else."""
    return (
        len(report.ways) == 1
        and report.tolerance == EXPLAINED
        and not (report.sums or report.parts or report.balanced or report.window or report.own_rules)
        and not (report.absent_is_zero or report.counts_before_changes or report.unmeasured)
        and not (report.explanation.padding_sensitive or report.in_training.mixing or report.inexact())
    )


@dataclass(frozen=True)
class VerdictCache:
    """A folder with a file for each verdict.

    Attributes:
        folder: the folder, which is created on the first write.
        key: the name of the entry: a hash of everything that the verdict depends on.
    """

    folder: Path
    key: str

    def find(self) -> Verdict | None:
        """Return the verdict; None if there is none, or if the entry is broken."""
        try:
            with self._path.open("rb") as file:
                found = json.loads(file.read(_MOST_BYTES))
        except (OSError, ValueError, RecursionError):
            return None
        return _verdict(found)

    def keep(self, verdict: Verdict) -> None:
        """Write a verdict. A folder that cannot be written to is no error."""
        try:
            with atomic_write(self._path) as path:
                path.write_text(json.dumps({"version": _VERSION, **asdict(verdict)}), encoding="utf-8")
        except (OSError, ValueError) as error:  # a full disk, another process that writes the same entry, an odd path
            logger.debug(f"The verdict of the self-check was not cached: {error}")

    def allow_labels(self, *, gives_logits: bool) -> None:
        """Add to the verdict, if there is one, that logits at labelled positions are enough.

        Args:
            gives_logits: whether the model then returns the outputs of its head unchanged, as logits.
        """
        self._add(at_labels=True, gives_logits=gives_logits)

    def add_whole(self, whole: str) -> None:
        """Add to the verdict, if there is one, that it explains the loss of whole rows.

        Args:
            whole: the hash of these rows.
        """
        self._add(whole=whole)

    def _add(self, **findings: Any) -> None:
        if (verdict := self.find()) is not None:
            self.keep(replace(verdict, **findings))

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.key}.json"


def _verdict(found: Any) -> Verdict | None:
    """Return the verdict that an entry holds; None if anything in it has another name or type."""
    kinds = {
        "version": int,
        "way": str,
        "measured": bool,
        "shifts": bool,
        "longest": int,
        "at_labels": bool,
        "gives_logits": bool,
        "whole": str,
    }
    if not isinstance(found, dict) or found.keys() != kinds.keys():
        return None
    if any(type(found[name]) is not kind for name, kind in kinds.items()) or found.pop("version") != _VERSION:
        return None
    return Verdict(**found)
