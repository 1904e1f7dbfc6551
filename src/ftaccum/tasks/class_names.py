"""The names of the classes in a column of labels."""

from datasets import ClassLabel, Dataset

from ..errors import DataError


def class_names(rows: Dataset, label: str = "label") -> list[str]:
    """Return the classes of a label column, in the order of their numbers.

    Raises:
        DataError: if the column has gaps, or if its labels are neither names nor integers from 0 on.
    """
    feature = rows.features[label]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    found = rows.unique(label)
    if None in found:
        raise DataError(f"Some rows have no label in {label!r}. Drop these rows, or give them a label.")
    found.sort()
    if all(isinstance(value, str) for value in found):
        return found
    if all(isinstance(value, int) and value >= 0 for value in found):
        return [str(number) for number in range(found[-1] + 1)]
    raise DataError(
        f"Labels must be names or whole numbers from 0 on, but {label!r} has {found[:5]}. Convert them first."
    )
