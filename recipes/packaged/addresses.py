"""Addresses in the United States with a label for each word, MIT (package usaddress, by DataMade and contributors)."""

import random
from collections.abc import Iterable
from typing import Any
from xml.etree import ElementTree

from .files import CACHE, letters_and_digits, unpacked, write_jsonl

ADDRESSES_TRAIN, ADDRESSES_VAL = CACHE / "addresses_train.jsonl", CACHE / "addresses_val.jsonl"
PATHS = (ADDRESSES_TRAIN, ADDRESSES_VAL)

_PACKAGE, _FILE = "usaddress==0.5.16", "labeled.xml"
_HELD_OUT = 300


def prepare() -> None:
    """Prepare addresses as JSON lines {"tokens": [...], "tags": [...]}. The same 300 addresses are always held out."""
    with unpacked(_PACKAGE, megabytes=1, from_source=True) as folder:
        rows = as_rows(ElementTree.parse(next(folder.rglob(_FILE))).getroot())
    random.Random(0).shuffle(rows)
    write_jsonl(ADDRESSES_VAL, rows[:_HELD_OUT])
    write_jsonl(ADDRESSES_TRAIN, rows[_HELD_OUT:])


def as_rows(addresses: Iterable[Iterable[ElementTree.Element]]) -> list[dict[str, Any]]:
    """Return the words and the labels of each address, without addresses that have the same letters and digits."""
    rows: dict[str, dict[str, Any]] = {}
    for address in addresses:
        words, labels = [(word.text or "").strip() for word in address], [word.tag for word in address]
        rows.setdefault(letters_and_digits("".join(words)), {"tokens": words, "tags": labels})
    return list(rows.values())
