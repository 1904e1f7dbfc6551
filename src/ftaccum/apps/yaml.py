"""YAML files of `name: value` lines, read by the rules of YAML 1.2."""

import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import SettingsError, shown

_TAG = "tag:yaml.org,2002:"
# The scalars of YAML 1.2. PyYAML reads YAML 1.1, where `no` is False, 1e-5 is a string and 1:30 is 90.
_SCALARS = {
    "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


class _Loader(yaml.SafeLoader):
    """A loader that rejects repeated keys: PyYAML would silently drop all values but the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        names = [key.value for key in keys]
        for n, key in enumerate(keys):
            if key.value in names[:n]:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} appears twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.removeprefix(_TAG) not in _SCALARS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), list(_first))


def read_mapping(file: Path, argument: str) -> dict[Any, Any]:
    """Return the mapping in a YAML file.

    Args:
        argument: the option that names the file, for error messages.

    Raises:
        SettingsError: if the file cannot be read, or does not hold a mapping.
    """
    try:
        read = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or a huge integer
        raise SettingsError(
            [f"`{argument}` {str(file)!r} cannot be read: {error}. Give a text file of `name: value` lines."]
        ) from error
    if not isinstance(read, dict):
        raise SettingsError(
            [f"`{argument}` {str(file)!r} must hold `name: value` lines, but holds {shown(read)} instead."]
        )
    return read
