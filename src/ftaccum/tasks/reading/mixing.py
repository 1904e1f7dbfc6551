"""Several sources as one: their columns must agree, weights may mix their rows, and a limit takes some of each."""

import itertools
from collections.abc import Sequence
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, Features, IterableDataset, Json, List, Value

from ...errors import DataError, SettingsError, listed
from ...runtime.log import logger

_FIX = "Rename or convert it, so that all sources have the same columns"


def join(
    named: Sequence[tuple[str, Any]], weights: Sequence[float] | None, seed: int, argument: str
) -> Dataset | IterableDataset:
    """Return the rows of several sources.

    Without weights, one source follows the other. With weights, each row comes from a source drawn with these
    probabilities, in the order of that source. Mixing ends when the source that was drawn has no more rows. So no row
    repeats, and rows held out for validation are not among the others.

    Args:
        named: the name and the rows of each source.

    Raises:
        DataError: if the columns differ in names or types. It names the source and the column.
    """
    if len(named) == 1:
        return named[0][1]
    rows = _agreeing(named, argument)
    if weights is None:
        return datasets.concatenate_datasets(rows)
    total = sum(weights)
    mixed = datasets.interleave_datasets(
        rows, [weight / total for weight in weights], seed=seed, stopping_strategy="first_exhausted"
    )
    shares = ", ".join(f"{weight / total:.3g} {name}" for weight, (name, _) in zip(weights, named, strict=True))
    if isinstance(mixed, Dataset):
        n_all = sum(map(len, rows))
        logger.info(f"`{argument}` mixes {len(mixed)} of {n_all} rows ({shares}), until one source has no more rows.")
    return mixed


def first_of_each(rows: Dataset, sizes: Sequence[int], limit: int) -> Dataset:
    """Return the first rows of each part of the rows, in proportion to its size. In all, these are `limit` rows.

    Args:
        sizes: the number of rows of each part, in order.
    """
    bounds = [0, *itertools.accumulate(sizes)]
    if limit >= bounds[-1]:
        return rows
    shares = [-(-limit * bound // bounds[-1]) for bound in bounds]
    pairs = zip(bounds, itertools.pairwise(shares), strict=False)  # the last bound begins no part
    return rows.select([start + n for start, (before, after) in pairs for n in range(after - before)])


def check_weights(weights: Sequence[float] | None, n_sources: int, argument: str) -> None:
    """Raise SettingsError if there is not one weight for each source."""
    if weights is not None and len(weights) != n_sources:
        raise SettingsError(
            [
                f"`train_data_weights` has {len(weights)} number{'s' * (len(weights) != 1)}, but `{argument}` names "
                f"{n_sources} source{'s' * (n_sources != 1)}. Give one weight for each, such as `--{argument} "
                "a.csv,b.jsonl --train_data_weights 0.7,0.3`."
            ]
        )


def _agreeing(named: Sequence[tuple[str, Any]], argument: str) -> list[Any]:
    """Return the rows of the sources with columns in one order, and of one type."""
    first, rows = named[0]
    if any(each.features is None for _, each in named):  # of a stream that does not declare them
        return [each for _, each in named]
    features = Features(rows.features)
    for name, others in named[1:]:
        if lacking := [column for column in features if column not in others.features]:
            raise DataError(f"`{argument}` {name!r} has no column {lacking[0]!r}, which {first!r} has. {_FIX}.")
        if more := [column for column in others.features if column not in features]:
            raise DataError(f"`{argument}` {name!r} has a column {more[0]!r}, which {first!r} does not have. {_FIX}.")
        for column, feature in others.features.items():
            both = _common(features[column], feature)
            if both is None:
                raise DataError(
                    f"`{argument}` {name!r} has {_described(feature)} in its column {column!r}, but {first!r} has "
                    f"{_described(features[column])}. {_FIX}."
                )
            features[column] = both
    return [
        each if each.features == features else each.select_columns(list(features)).cast(features) for _, each in named
    ]


def _common(one: Any, other: Any) -> Any:
    """Return a feature that has the values of both; None if there is none."""
    if one == other:
        return one
    if isinstance(one, Value) and isinstance(other, Value):
        kinds = {
            "float" if each.dtype.startswith("float") else each.dtype.strip("u0123456789") for each in (one, other)
        }
        return Value("float64" if "float" in kinds else "int64") if kinds <= {"int", "float"} else None
    # Lists and objects of other forms are kept as JSON.
    return (
        Json() if isinstance(one, list | List | dict | Json) and isinstance(other, list | List | dict | Json) else None
    )


def _described(feature: Any) -> str:
    if isinstance(feature, ClassLabel):
        return f"the classes {listed(feature.names, 6)}"
    words = {"string": "text", "int64": "whole numbers", "float64": "numbers", "bool": "true or false"}
    return words.get(getattr(feature, "dtype", ""), f"the type {feature}")
