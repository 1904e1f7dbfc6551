"""The labels of rows: one class, several classes, or a number for each row; and the names of the classes."""

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from datasets import ClassLabel, Dataset, LargeList, List

from ..errors import DataError, listed
from ..runtime.log import logger

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"

_NAMED = 10  # classes to name in a message
_REMEDY = (
    "Labels are names, whole numbers from 0 on, booleans, lists of these, or decimal numbers to predict. "
    "`problem_type` decides which of these they are."
)


@dataclass(frozen=True)
class Labels:
    """The labels of rows.

    Attributes:
        problem_type: as in the config of a Transformers model: one class, several classes, or a number.
        names: the names of the classes, in the order of their numbers; none for a number.
        values: the labels as they are in the data, in this order; none if they are class numbers already.
        multi_hot: whether lists have a 0 or 1 for each class.
    """

    problem_type: str
    names: tuple[str, ...] = ()
    values: tuple[Hashable, ...] = ()
    multi_hot: bool = False

    @classmethod
    def read(cls, rows: Dataset, argument: str, problem_type: str | None = None) -> "Labels":
        """Return the kind and the classes of the labels of rows. Log the classes with their numbers of rows.

        Args:
            argument: the argument that names the rows, for messages.
            problem_type: the kind of the labels; None to recognize it by their type.

        Raises:
            DataError: if rows have no label, or the labels do not fit.
        """
        values = _labels_of(rows, argument)
        feature = rows.features["label"]
        inner = feature.feature if isinstance(feature, List | LargeList) else None
        problem_type = problem_type or _problem_type(values, argument, nested=inner is not None)
        if problem_type == REGRESSION:
            _check(values, argument, problem_type, _is_number, "a number")
            return cls(REGRESSION)
        if problem_type == MULTI:
            _check(values, argument, problem_type, lambda value: isinstance(value, list), "a list of classes")
            if _is_multi_hot(values):
                return _described(cls(MULTI, _unnamed(len(values[0])), (), True), values)
            each = list(chain.from_iterable(values))
        else:
            inner, each = feature, values
            _check(values, argument, problem_type, lambda value: not isinstance(value, list), "one class")
        if isinstance(inner, ClassLabel):
            return _described(cls(problem_type, tuple(inner.names)), values)
        names, found = _classes(each, argument)
        return _described(cls(problem_type, names, found), values)

    @classmethod
    def of_config(cls, config: Any) -> "Labels":
        """Return the labels that a trained model predicts."""
        if config.problem_type == REGRESSION or (config.problem_type is None and config.num_labels == 1):
            return cls(REGRESSION)
        names = tuple(config.id2label[n] for n in range(config.num_labels))
        multi_hot = names == _unnamed(len(names))
        return cls(config.problem_type or SINGLE, names, (), config.problem_type == MULTI and multi_hot)

    def head(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` that define a head for these labels."""
        head: dict[str, Any] = {"problem_type": self.problem_type, "ignore_mismatched_sizes": True}
        if self.problem_type == REGRESSION:
            return head | {"num_labels": 1}
        ids = dict(enumerate(self.names))
        return head | {"id2label": ids, "label2id": {name: n for n, name in ids.items()}}

    def encode(self, rows: Dataset, argument: str) -> Dataset:
        """Return the rows with labels as the model takes them: a class number, a float, or a float for each class.

        Raises:
            DataError: naming the first row whose label is missing, or is none of the classes.
        """
        labels, values = self._of_rows(_labels_of(rows, argument), rows.features["label"])
        encoded = [labels._number(value, f"In `{argument}`, row {n}") for n, value in enumerate(values)]
        return rows.remove_columns("label").add_column("label", encoded)

    def _of_rows(self, values: list[Any], feature: Any) -> tuple["Labels", list[Any]]:
        """Return the labels and values of rows in which numbers of classes are this object's, or names.

        The classes of other rows may have other numbers: those of a folder of images that lacks a class, or class names
        that are numbers, which a CSV file has as whole numbers.
        """
        if self.problem_type == REGRESSION:
            return self, values
        are_lists = all(isinstance(value, list) for value in values)
        is_multi = self.problem_type == MULTI and are_lists
        if is_multi and _is_multi_hot(values) and len(values[0]) == len(self.names) and not self._are_sets(values):
            return replace(self, multi_hot=True), values
        inner = feature.feature if isinstance(feature, List | LargeList) else feature
        if isinstance(inner, ClassLabel):
            if tuple(inner.names) == self.names or _are_unnamed(self.names):
                return replace(self, values=()), values
            names = dict(enumerate(inner.names))
            return replace(self, values=self.names), _mapped(values, lambda each: names.get(each, each))
        each = list(chain.from_iterable(values) if are_lists else values)
        are_numbers = all(isinstance(one, int) and not isinstance(one, bool) for one in each)
        if (
            self.values
            or not are_numbers
            or _are_unnamed(self.names)
            or not any(str(one) in self.names for one in each)
        ):
            return self, values
        logger.info("The labels are whole numbers, and so are names of classes. They are read as names.")
        return replace(self, values=self.names), _mapped(values, str)

    def _are_sets(self, values: Sequence[Sequence[Any]]) -> bool:
        """Return whether lists may hold numbers of classes, because the classes are numbers, and none is held twice."""
        are_numbered = self.names == tuple(map(str, range(len(self.names))))
        return are_numbered and all(len(set(value)) == len(value) for value in values)

    def _number(self, value: Any, name: str) -> Any:
        if self.problem_type == REGRESSION:
            if not _is_number(value):
                raise DataError(f"{name} has the label {value!r}, which is no number. Fix or drop the row.")
            return float(value)
        if self.problem_type == SINGLE:
            return self._class(value, name)
        if not isinstance(value, list):
            raise DataError(f"{name} has the label {value!r}, which is no list of classes. Fix or drop the row.")
        if self.multi_hot:
            if len(value) != len(self.names):
                raise DataError(
                    f"{name} has {len(value)} labels, but there are {len(self.names)} classes. Give a 0 or 1 for each."
                )
            if not all(each in (0, 1) for each in value):
                raise DataError(f"{name} has the label {value!r}, but needs a 0 or 1 for each class. Fix the label.")
            return [float(each) for each in value]
        held = {self._class(each, name) for each in value}
        return [float(n in held) for n in range(len(self.names))]

    def _class(self, value: Any, name: str) -> int:
        if not self.values:
            if isinstance(value, int) and 0 <= value < len(self.names):
                return value
            value = str(value).lower() if isinstance(value, bool) else str(value)
            known: Sequence[Hashable] = self.names
        else:
            known = self.values
        if value not in known:
            raise DataError(
                f"{name} has the label {value!r}, which is none of the classes that the model is trained on: "
                f"{listed([*map(repr, known)], _NAMED)}. Fix the label, or train on such rows."
            )
        return known.index(value)


def _labels_of(rows: Dataset, argument: str) -> list[Any]:
    """Return the labels of all rows.

    Raises:
        DataError: if rows have no label. It counts them and names the first.
    """
    values = list(rows["label"])
    missing = [n for n, value in enumerate(values) if _is_missing(value)]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(values)} rows of `{argument}` have no label in 'label'; the first is row "
            f"{missing[0]}. Give these rows a label, or drop them."
        )
    return values


def _problem_type(values: Sequence[Any], argument: str, *, nested: bool) -> str:
    if nested:
        return MULTI
    if not all(isinstance(value, float) for value in values):
        return SINGLE
    if all(value.is_integer() for value in values):
        raise DataError(
            f"The labels of `{argument}` are decimal numbers, such as {values[0]!r}, but all of them are whole. Set "
            f"`problem_type` to {SINGLE!r} if they are classes, or to {REGRESSION!r} to predict a number."
        )
    return REGRESSION


def _classes(values: Iterable[Any], argument: str) -> tuple[tuple[str, ...], tuple[Hashable, ...]]:
    """Return the names of classes, and the values that stand for them if they are not class numbers."""
    found = set(values)
    if all(isinstance(value, bool) for value in found):
        return ("false", "true"), (False, True)
    if all(isinstance(value, str) for value in found):
        names = tuple(sorted(found))
        return names, names
    whole = {int(value) for value in found if _is_number(value) and float(value).is_integer()}
    if len(whole) == len(found) and min(whole) >= 0:
        return tuple(map(str, range(max(whole) + 1))), tuple(range(max(whole) + 1))
    raise DataError(f"The labels of `{argument}` are {listed(sorted(map(repr, found)), _NAMED)}. {_REMEDY}")


def _check(values: Sequence[Any], argument: str, problem_type: str, fits: Callable[[Any], bool], wanted: str) -> None:
    """Raise DataError for the first label that does not fit the problem type."""
    for n, value in enumerate(values):
        if not fits(value):
            raise DataError(
                f"In `{argument}`, row {n} has the label {value!r}, but the label of {problem_type!r} is {wanted}. "
                f"{_REMEDY}"
            )


def _described(labels: Labels, values: Sequence[Any]) -> Labels:
    """Log the classes and their numbers of rows, so that a misspelled one is seen, and return the labels."""
    if labels.multi_hot:
        counts = Counter({name: sum(bool(row[n]) for row in values) for n, name in enumerate(labels.names)})
    else:
        known = labels.values or range(len(labels.names))
        each = chain.from_iterable(values) if labels.problem_type == MULTI else values
        numbers_of = Counter(each)
        counts = Counter({name: numbers_of[value] for name, value in zip(labels.names, known, strict=True)})
    counted = [f"{name} ({counts[name]:,})" for name in labels.names]
    logger.info(f"Classes: {listed(counted, _NAMED)}")
    return labels


def _unnamed(n: int) -> tuple[str, ...]:
    """Return the names of classes that the data do not name."""
    return tuple(f"class {number}" for number in range(n))


def _are_unnamed(names: Sequence[str]) -> bool:
    """Return whether classes have only numbers: those of data without names, or those that Transformers gives them."""
    return all(re.fullmatch(rf"(class |LABEL_)?{n}", name) for n, name in enumerate(names))


def _mapped(values: Sequence[Any], change: Callable[[Any], Any]) -> list[Any]:
    """Return values, or the values in lists, as a function changes them."""
    return [[change(each) for each in value] if isinstance(value, list) else change(value) for value in values]


def _is_multi_hot(values: Sequence[Any]) -> bool:
    """Return whether all lists have one 0 or 1 for each class."""
    widths = {len(value) for value in values}
    return len(widths) == 1 and widths != {1} and all(each in (0, 1) for value in values for each in value)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or value == ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
