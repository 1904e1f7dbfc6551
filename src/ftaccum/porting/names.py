"""The table of all foreign names, and the hint for a name that a function or a command does not take."""

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from .foreign_name import ARGUMENT, ForeignName
from .hugging_face import TRAINER, TRL
from .other_libraries import AXOLOTL, LIGHTNING, PYTORCH

TABLES: Mapping[str, tuple[ForeignName, ...]] = {
    "Trainer": TRAINER,
    "TRL": TRL,
    "PyTorch": PYTORCH,
    "Lightning": LIGHTNING,
    "Axolotl": AXOLOTL,
}
_FOUND = {name: row for table in TABLES.values() for row in table for name in row.names.split()}
# Below this similarity, a name with a similar spelling often means another quantity: `val_batch_size`, `batch_size`.
_SIMILAR = 0.85
_SHORTEST_PREFIX = 4

# Writes an argument, and its value as Python text if it has one, as users of Python, flags or YAML would.
Notation = Callable[[str, str], str]


def python(name: str, value: str = "") -> str:
    return f"{name}={value}" if value else name


def flags(name: str, value: str = "") -> str:
    return f"--{name} {_plain(value)}" if value else f"--{name}"


def yaml(name: str, value: str = "") -> str:
    return f"{name}: {_plain(value)}" if value else name


def _plain(value: str) -> str:
    return value.strip('"').replace("True", "true").replace("False", "false")


@dataclass(frozen=True)
class KnownNames:
    """The names that a function or a command takes, and what to say about others.

    Attributes:
        here: the names that it takes.
        kind: "argument" or "option".
        notation: how to write a name in messages.
        elsewhere: for names that others take, who takes them, for a message.
        renamed: for arguments of `test_fine_tuning` that have another name here, that name.
        reasons: for names that are not taken on purpose, a sentence on what to do.
        otherwise: where to give a name that nobody named above takes.
        listed: a sentence that says where all names are listed.
    """

    here: Collection[str]
    kind: str
    notation: Notation
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    otherwise: str = ""
    listed: str = ""

    def hint(self, unknown: str) -> str:
        """Return the rest of a sentence that ends with a name that is not taken, and says what to write instead."""
        name = unknown.lstrip("-").replace("-", "_").lower()
        if name in self.renamed:
            return f"; here: `{self.notation(self.renamed[name], '')}`."
        who = f"is an {self.kind} of {self.elsewhere[name]}." if name in self.elsewhere else ""
        if name in _FOUND:
            return self._answer(_FOUND[name]) + (f" `{self.notation(name, '')}` {who}" if who else "")
        taken_by = f" It {who}" if who else ""
        similar = self._similar(name)
        meant = f" Did you mean {' or '.join(repr(self.notation(each, '')) for each in similar)}?" if similar else ""
        return "." + ((taken_by + meant) or f" {self.listed}".rstrip())

    def _answer(self, row: ForeignName) -> str:
        targets = [self.renamed.get(target, target) for target in row.targets]
        note = f" {self._written(row.note)}" if row.note else ""
        if not targets:
            return f".{note}"
        if any(target in self.here for target in targets):
            return f"; here: {self._written(row.here)}.{note}"
        if refused := [self.reasons[target] for target in targets if target in self.reasons]:
            return f". {' '.join(refused)}"
        if taken := [target for target in targets if target in self.elsewhere]:
            who = f"`{self.notation(taken[0], '')}` is an {self.kind} of {self.elsewhere[taken[0]]}"
            return f". {who}.{note}"
        return f"; {self.otherwise}: {row.here}.{note}"

    def _written(self, text: str) -> str:
        """Return a text with the arguments that are taken here as one would write them here."""

        def write(name: str, value: str) -> str:
            renamed = self.renamed.get(name, name)
            known = renamed in self.here
            return f"`{(self.notation if known else python)(renamed if known else name, value)}`"

        return ARGUMENT.sub(lambda found: write(found[1], found[2] or ""), text)

    def _similar(self, name: str) -> list[str]:
        """Return the names with almost the same spelling or, for the beginning of a few names, these names."""
        longer = [each for each in self.here if len(name) >= _SHORTEST_PREFIX and each.startswith(name)]
        return longer if 0 < len(longer) < _SHORTEST_PREFIX else difflib.get_close_matches(name, self.here, 1, _SIMILAR)
