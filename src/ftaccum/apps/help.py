"""The help page of a command: the options that most people need, or all of them in groups, each with an example."""

import shutil
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Literal, get_args, get_origin

from ..fields import traits_of
from .examples import EXAMPLES

_OPTION_WIDTH = 36  # columns for an option and its example
_NARROWEST, _WIDEST = 90, 120

# The groups in the order of the page. Others follow.
_GROUPS = (
    "model and data",
    "adapters",
    "loss",
    "length of training",
    "size of an update",
    "optimization",
    "evaluation",
    "precision",
    "speed and memory",
    "checkpoints and output",
    "logging",
)


@dataclass(frozen=True)
class HelpPage:
    """The help page of a command.

    Attributes:
        usage: how to call the command.
        description: what the command does.
        first: the options that most people need; none for all.
    """

    usage: str
    description: str
    first: Sequence[str] = ()

    def show(self, kinds: Sequence[type], *, everything: bool) -> str:
        """Return the page.

        Args:
            kinds: dataclasses whose fields are the options.
            everything: whether to list all options.
        """
        declared = {f.name: f for kind in kinds for f in fields(kind)}
        width = min(_WIDEST, max(_NARROWEST, shutil.get_terminal_size((100, 24)).columns))
        lines = [f"usage: {self.usage}", "", self.description, ""]
        if self.first and not everything:
            lines += ["options:", *_described([declared[name] for name in self.first], width), ""]
            rest = len(declared) - len(self.first)
            more = f"--help-all lists {rest} more options. --config FILE reads options from a YAML file."
            return "\n".join([*lines, more, ""])
        for title, listed in by_group(declared).items():
            lines += [f"{title}:", *_described(listed, width), ""]
        config = _line("--config run.yaml", "YAML file of these options; flags override it", width)
        return "\n".join([*lines, "other:", config, ""])


def by_group(declared: Mapping[str, Field]) -> dict[str, list[Field]]:
    """Return the options of a command by the title of their group, in the order of the page."""
    found: dict[str, list[Field]] = {title: [] for title in _GROUPS}
    for one in declared.values():
        found.setdefault(traits_of(one).group or "other options", []).append(one)
    return {title: listed for title, listed in found.items() if listed}


def _described(listed: Collection[Field], width: int) -> Iterator[str]:
    for one in listed:
        value = default_text(one)
        text = (one.metadata.get("help") or one.name) + (f" (default: {value})" if value else "")
        yield _line(usage_of(one), text, width)


def default_text(option: Field) -> str:
    """Return the default of an option as text; empty for None, off and an empty value."""
    default = None if option.default is MISSING else option.default
    if default is None or default is False or default in ("", ()):
        return ""
    return "on" if default is True else str(default)


def usage_of(option: Field) -> str:
    """Return an option as typed, with an example of its value."""
    return f"--{option.name} {_example(option)}".rstrip()


def _example(option: Field) -> str:
    """Return an example of a value, or the values of a Literal. A flag is turned on by its name alone."""
    if get_origin(option.type) is Literal:
        return "|".join(map(str, get_args(option.type)))
    default = option.default
    found = EXAMPLES.get(option.name, "" if default is False else "no" if default is True else "…")
    return found if isinstance(found, str) else found[traits_of(option).group]


def _line(option: str, text: str, width: int) -> str:
    """Return an option and its meaning in two columns."""
    indent = " " * (_OPTION_WIDTH + 2)
    lines = textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    if len(option) >= _OPTION_WIDTH:
        return "\n".join([f"  {option}", *lines])
    return "\n".join([f"  {option:<{_OPTION_WIDTH}}{lines[0].lstrip()}", *lines[1:]])
