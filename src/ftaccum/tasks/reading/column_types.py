"""The Arrow types of columns of Python values, as JSON has them."""

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

JSON = pa.json_()  # values that Arrow would change: objects with different keys, lists with different things
_KINDS: dict[type, str] = {
    bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object",
}  # fmt: skip


def kind_of(value: Any) -> str:
    """Return the kind of a JSON value as messages name it, such as "a number"."""
    return "null" if value is None else _KINDS[type(value)]


def first_of_another_kind(values: Sequence[Any], kind: str | None) -> tuple[int | None, str | None]:
    """Return the position of the first value of another kind, or None; and the kind of these values.

    Args:
        kind: the kind of the values before; None if there are none, or only nulls.
    """
    for n, value in enumerate(values):
        if value is not None:
            found = kind_of(value)
            if kind is not None and found != kind:
                return n, kind
            kind = found
    return None, kind


def type_of(values: Sequence[Any]) -> pa.DataType:
    """Return the Arrow type that keeps values of one kind as they are.

    It is `JSON` for lists and objects that every other type would change.

    Raises:
        pyarrow.ArrowInvalid, OverflowError: for numbers that do not fit in 64 bits.
    """
    if all(not isinstance(value, list | dict) for value in values):
        return pa.array(values).type
    try:
        array = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return JSON
    # Arrow gives all objects of a column the same keys.
    return array.type if array.to_pylist() == list(values) and not _has_empty_object(array.type) else JSON


def merged(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Return the type that keeps values of either type as they are."""
    if one.equals(other) or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if {one, other} == {pa.int64(), pa.float64()}:
        return pa.float64()
    if pa.types.is_list(one) and pa.types.is_list(other):
        inner = merged(one.value_type, other.value_type)
        return JSON if inner == JSON else pa.list_(inner)
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        names = [field.name for field in one.fields]
        if sorted(names) == sorted(field.name for field in other.fields):
            inner = {name: merged(one.field(name).type, other.field(name).type) for name in names}
            return JSON if JSON in inner.values() else pa.struct(inner)
    return JSON


def final_type(found: pa.DataType) -> pa.DataType:
    """Return the type to store a column with: text where it has only nulls."""
    if pa.types.is_list(found):
        return pa.list_(final_type(found.value_type))
    if pa.types.is_struct(found):
        return pa.struct({field.name: final_type(field.type) for field in found.fields})
    return pa.string() if pa.types.is_null(found) else found


def as_array(values: Sequence[Any], type_: pa.DataType) -> pa.Array:
    """Return values as an Arrow array of a type that `type_of` and `merged` found.

    Raises:
        pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError: if a value does not fit.
    """
    if type_ != JSON:
        return pa.array(values, type_)
    texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    return pa.ExtensionArray.from_storage(JSON, pa.array(texts, pa.string()))


def _has_empty_object(found: pa.DataType) -> bool:
    if pa.types.is_list(found):
        return _has_empty_object(found.value_type)
    return pa.types.is_struct(found) and (not found.num_fields or any(_has_empty_object(f.type) for f in found.fields))
