"""Addresses in the United States with a label for each word, MIT (package usaddress, by DataMade and contributors)."""

import random
from collections.abc import Iterable
from typing import Any
from xml.etree import ElementTree

from .files import CACHE, say, unpacked_source, write_jsonl

ADDRESSES_TRAIN, ADDRESSES_VAL = CACHE / "addresses_train.jsonl", CACHE / "addresses_val.jsonl"
PATHS = (ADDRESSES_TRAIN, ADDRESSES_VAL)

_PACKAGE, _FILE = "usaddress==0.5.16", "labeled.xml"
_HELD_OUT = 300


def prepare() -> None:
    """Prepare addresses as JSON lines {"tokens": [...], "tags": [...]}. The same 300 addresses are always held out."""
    say("Preparing addresses (once): a download of 1 MB …")
    train, held_out = read()
    write_jsonl(ADDRESSES_VAL, held_out)
    write_jsonl(ADDRESSES_TRAIN, train)


def read() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Download the package, and return the addresses to train on and those that are held out."""
    with unpacked_source(_PACKAGE) as folder:
        root = ElementTree.parse(next(folder.rglob(_FILE))).getroot()
    rows = as_rows(root)
    random.Random(0).shuffle(rows)
    return rows[_HELD_OUT:], rows[:_HELD_OUT]


def as_rows(addresses: Iterable[Iterable[ElementTree.Element]]) -> list[dict[str, Any]]:
    """Return the words and the labels of each address. An address that comes again is left out, also in other case."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for address in addresses:
        words, labels = [(word.text or "").strip() for word in address], [word.tag for word in address]
        rows.setdefault(tuple(word.lower() for word in words), {"tokens": words, "tags": labels})
    return list(rows.values())
