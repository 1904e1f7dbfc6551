"""The columns that a task reads: those that the user names for its roles, or those with usual names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import DataError, SettingsError
from .arguments import NamedArguments


@dataclass(frozen=True)
class Role:
    """The use of a column in a task, such as its label.

    Attributes:
        usual: names of such a column, the most usual one first.
        required: whether the data must have it.
    """

    usual: tuple[str, ...]
    required: bool = True


def naming(role: str, column: str = "NAME") -> str:
    """Return how to name the column of a role, on the command line and in Python, for messages."""
    return f"`--columns {role}={column}` (in Python: `columns='{role}={column}'`)"


def named_columns(named: NamedArguments, roles: Mapping[str, Role]) -> dict[str, str]:
    """Return the columns that the options name, by role.

    Raises:
        SettingsError: if an option is not of the form role=column, or the task has no such role.
    """
    given = dict(pair.split("=", 1) for pair in named.columns if "=" in pair)
    faults = [f"`columns` has {pair!r}, which is not role=column." for pair in named.columns if "=" not in pair]
    faults += [
        f"`columns` names the role {role!r}, but the roles of the task {named.task!r} are: {_listed(roles)}."
        for role in given
        if role not in roles
    ]
    if named.label_column is not None:
        if "label" not in roles:
            faults.append(f"`label_column` is given, but the task {named.task!r} has no labels of that kind.")
        given["label"] = named.label_column
    if faults:
        remedy = f"Write, for example, {naming(next(iter(roles)))}." if roles else "Leave it out."
        raise SettingsError([f"{fault} {remedy}" for fault in faults])
    return given


def choose_columns(
    columns: Sequence[str], roles: Mapping[str, Role], given: Mapping[str, str], argument: str
) -> dict[str, str]:
    """Return the column of each role.

    Args:
        columns: the columns of the data.
        given: the columns that the user names, by role.
        argument: the argument that names the data, for messages.

    Raises:
        DataError: if the data lack a column.
    """
    chosen = {}
    for role, kind in roles.items():
        names = (given[role],) if role in given else kind.usual
        found = next((name for name in names if name in columns), None)
        if found is not None:
            chosen[role] = found
        elif kind.required or role in given:
            raise DataError(
                f"`{argument}` has no column {' or '.join(map(repr, names))} for the {role}, only {_listed(columns)}. "
                f"Name it: {naming(role)}."
            )
    return chosen


def describe_columns(chosen: Mapping[str, str], columns: Sequence[str]) -> str:
    """Return a sentence on which columns are read and which are not."""
    read = ", ".join(f"{column!r} as {role}" for role, column in chosen.items())
    left_out = [name for name in columns if name not in chosen.values()]
    parts = [read, f"left out: {_listed(left_out)}" if left_out else ""]
    return f"Columns: {'; '.join(filter(None, parts)) or 'none'}"


def _listed(names: Sequence[str] | Mapping[str, object]) -> str:
    return ", ".join(map(repr, names)) or "none"
