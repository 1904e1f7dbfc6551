"""Read the file of a ledger, which may be damaged or of another version."""

import json
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from .ledger import AuditEntry, Entry, EpochEntry, EvaluationEntry, Ledger, NoiseScaleEntry, WindowEntry, nan_null

_KINDS: dict[str, type[Entry]] = {  # by a name that the later ones do not have
    "window": WindowEntry,
    "audit": AuditEntry,
    "evaluation": EvaluationEntry,
    "noise_scale": NoiseScaleEntry,
    "train_loss": EpochEntry,
}
_TYPES = {kind: {f.name: f.type for f in fields(kind)} for kind in _KINDS.values()}
_REQUIRED = {kind: [f.name for f in fields(kind) if f.default is MISSING] for kind in _KINDS.values()}


def read_entry(line: str | bytes) -> Entry:
    """Return the entry in a line of a ledger file. A null becomes NaN, also if it was an infinity.

    Raises:
        ValueError: if the line is not an entry, or is one that only a newer version knows.
    """
    values = _values_in(line)
    kind = _kind_of(values)
    if kind is None or (unknown := set(values) - set(_TYPES[kind])):
        raise ValueError(f"unknown names {sorted(values) if kind is None else sorted(unknown)}")
    return _build(kind, values)


@dataclass(frozen=True)
class LedgerFile:
    """The entries in the file of a ledger, up to the first line that is damaged.

    Attributes:
        ledger: the entries. They are not written anywhere. Those of a kind that only a newer version knows are left
            out, and so are values that only a newer version knows.
        damaged_line: number of the first line, from 1, that is not an entry or repeats or skips a window, if any.
        ends_there: whether that is the last line, as after a kill while it was being written.
    """

    ledger: Ledger = field(default_factory=Ledger)
    damaged_line: int | None = None
    ends_there: bool = False

    @classmethod
    def read(cls, path: Path) -> "LedgerFile":
        """Return the entries in a file. There are none if the file cannot be read."""
        ledger = Ledger()
        with suppress(OSError), path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    _add_line(ledger, line)
                except ValueError:
                    # A line without an end is the last, though the run may have written on since it was read.
                    return cls(ledger, number, ends_there=not line.endswith(b"\n") or not file.read(1))
        return cls(ledger)

    @property
    def damage(self) -> str:
        """Say where the ledger is damaged; empty if it is not."""
        return "" if self.damaged_line is None else f"the ledger is damaged at line {self.damaged_line:,}"


def _add_line(ledger: Ledger, line: bytes) -> None:
    """Add the entry in a line, unless only a newer version knows its kind. Raise ValueError if the line is damaged."""
    values = _values_in(line)
    kind = _kind_of(values)
    if kind is None:
        return
    entry = _build(kind, values)
    if isinstance(entry, WindowEntry) and entry.window != len(ledger.windows):
        raise ValueError(f"window {entry.window} follows {len(ledger.windows)} windows")
    ledger.resume_from([entry])


def _values_in(line: str | bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(values, dict) or not values:
        raise ValueError("not an object with values")
    return values


def _kind_of(values: dict[str, Any]) -> type[Entry] | None:
    """Return the kind of entry that values are of; None if only a newer version knows it."""
    return next((kind for name, kind in _KINDS.items() if name in values), None)


def _build(kind: type[Entry], values: dict[str, Any]) -> Entry:
    """Return an entry from its values, without those of other names. Raise ValueError if some lack or are wrong."""
    wanted, missing = _TYPES[kind], [name for name in _REQUIRED[kind] if name not in values]
    if missing:
        raise ValueError(f"no values for {missing}")
    return kind(**{name: _checked(name, wanted[name], value) for name, value in values.items() if name in wanted})


def _checked(name: str, wanted: Any, value: Any) -> Any:
    """Return a value, with NaN for null where numbers are wanted. Raise ValueError if it is not of the wanted kind."""
    if type(value) is wanted:
        return value
    if wanted is float and (value is None or type(value) is int):
        return nan_null(value)
    if wanted == dict[str, float] and isinstance(value, dict):
        return {each: _checked(f"{name}[{each!r}]", float, number) for each, number in value.items()}
    raise ValueError(f"{name} is {value!r}")
