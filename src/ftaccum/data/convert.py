"""Turn the user's data into rows."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict

from ..errors import DataError
from .dataset import Rows
from .forms import by_row, without_leading_dimension
from .iterable import is_stream
from .row import FORMS

_OF_ITERATORS = (
    "Give a list of its rows. To train on them as a stream, give "
    "`train_data=datasets.IterableDataset.from_generator(make_rows)` and `max_updates`, where `make_rows` is a "
    "function that yields the rows from the first one on each time it is called."
)
_SYNTHETIC_ROWS, _SYNTHETIC_LENGTHS = 1000, (8, 32)


def as_rows(data: Any, argument: str) -> Rows:
    """Return data in any form that `test_fine_tuning` takes as rows; rows stay as they are.

    Raises:
        DataError: if the data have another form or no rows. The message says what to do.
    """
    if isinstance(data, Rows):
        return data
    data = by_row(data, argument)
    if isinstance(data, Mapping):
        kind = "a DatasetDict" if isinstance(data, DatasetDict) else f"a {type(data).__name__}"
        raise DataError(f"`{argument}` must be {FORMS}, but is {kind} instead. {_remedy_for_dict(data, argument)}")
    if is_stream(data):
        raise DataError(
            f"`{argument}` must be {FORMS}, but is a stream instead. "
            "Take the rows you want first, such as `list(itertools.islice(stream, 10_000))`."
        )
    if isinstance(data, torch.utils.data.DataLoader):
        raise DataError(
            f"`{argument}` must be {FORMS}, but is a DataLoader instead. Give its `.dataset`, its `.collate_fn` as "
            "`data_collator`, and `batch_size`: ftaccum shuffles, splits and pads the rows itself."
        )
    if isinstance(data, Iterator):
        raise DataError(
            f"`{argument}` must be {FORMS}, but is {type(data).__name__} instead, which can be read only "
            f"once. {_OF_ITERATORS}"
        )
    if isinstance(data, str | bytes) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise DataError(
            f"`{argument}` must be {FORMS}, but is {type(data).__name__} instead. "
            "Load files with `datasets.load_dataset` first."
        )
    if not len(data):
        raise DataError(f"`{argument}` has no rows. Give at least one; check the split or filter it came from.")
    Rows(argument, data).fetch([0])  # raises an error that names it if it is not a row
    return Rows(argument, without_leading_dimension(data, len(data)))


def _remedy_for_dict(data: Mapping[str, Any], argument: str) -> str:
    values = list(data.values())
    if values and all(hasattr(value, "__len__") and not isinstance(value, str) for value in values):
        return f"Give one split, such as `{argument}=data[{next(iter(data))!r}]`."
    return "Each column of a dict needs a list with a value for every row; put a single row in a list."


def synthetic_rows(vocab_size: int, longest: int | None, seed: int) -> Rows:
    """Return rows of random token ids of different lengths, for a run without data.

    Args:
        longest: the most tokens that the model takes in a row, if that is known.
    """
    draw = np.random.RandomState(seed)
    shortest, most = (min(length, longest or length) for length in _SYNTHETIC_LENGTHS)
    lengths = draw.randint(shortest, most + 1, size=_SYNTHETIC_ROWS)
    return Rows("train_data", [torch.from_numpy(draw.randint(0, vocab_size, size=n)) for n in lengths])
