"""The options for reading data files. This module does not load torch."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from ...arguments import find_faults, read_settings
from ...errors import refuse
from ...fields import Flag, Rule, setting

_data = partial(setting, group="model and data")
_WORDS = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}


def _is_encoding(value: Any) -> bool:
    return isinstance("".encode(value), bytes)  # raises LookupError for others, such as base64


def _read_weights(value: Any) -> Any:
    """Parse text such as "0.7,0.3" into numbers, and return any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        return value


Delimiter = Annotated[
    str,
    Rule(
        lambda v: isinstance(v, str) and len(v) == 1 and v not in '"\r\n\0',
        "one character, such as ',' or ';', or the word tab",
        lambda v: _WORDS.get(v.lower(), v) if isinstance(v, str) else v,
    ),
]
Encoding = Annotated[
    str, Rule(_is_encoding, "a text encoding that Python knows, such as utf-8, utf-16, cp1252 or shift_jis,")
]
Weights = Annotated[
    str,  # one command-line word; `_read_weights` parses it
    Rule(
        lambda v: isinstance(v, list | tuple) and bool(v) and all(0 < w < math.inf for w in v),
        "positive numbers, one for each source, such as 0.7,0.3",
        _read_weights,
    ),
]


@dataclass
class FileOptions:
    """The options for reading files."""

    delimiter: Delimiter | None = _data(
        None, "character between the columns of CSV and TSV files, such as ; or tab; none recognizes , ; tab and |"
    )
    encoding: Encoding | None = _data(
        None, "encoding of text files, such as cp1252; none recognizes UTF-8 and UTF-16, and takes cp1252 otherwise"
    )


@dataclass
class ReadingOptions(FileOptions):
    """The options for reading training data. `parse_options` turns the words of a command line into values."""

    train_data_weights: Weights | None = _data(
        None,
        "shares by which rows of several train_data are mixed, such as 0.7,0.3; none takes all rows, one source after "
        "the other",
    )
    streaming: Flag = _data(
        False, "read training rows while training, without a copy on disk; needs max_updates, and val_data or "
        "validation_split 0"
    )  # fmt: skip


def parse_options(options: ReadingOptions) -> ReadingOptions:
    """Return the options with text parsed into values.

    Raises:
        SettingsError: if an option is invalid. Lists every fault, one sentence each.
    """
    parsed = read_settings(ReadingOptions, vars(options))
    refuse(find_faults(parsed))
    return parsed
