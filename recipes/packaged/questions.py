"""Questions about addresses, which are generated from the labels in the package usaddress, MIT."""

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from . import addresses
from .addresses import ADDRESSES_TRAIN, ADDRESSES_VAL
from .files import CACHE, prepare_missing, write_jsonl

QUESTIONS_TRAIN, QUESTIONS_VAL = CACHE / "questions_train.jsonl", CACHE / "questions_val.jsonl"
PATHS = (QUESTIONS_TRAIN, QUESTIONS_VAL)

# The labels that a question is made for: the others are rare or hard to name.
_NAMES = {
    "AddressNumber": "house number",
    "StreetNamePreDirectional": "direction before the street name",
    "StreetNamePreType": "kind of street before its name",
    "StreetName": "street name",
    "StreetNamePostType": "kind of street after its name",
    "StreetNamePostDirectional": "direction after the street name",
    "OccupancyType": "kind of unit",
    "OccupancyIdentifier": "number of the unit",
    "BuildingName": "building",
    "Recipient": "recipient",
    "USPSBoxType": "kind of mailbox",
    "USPSBoxID": "number of the mailbox",
    "PlaceName": "city",
    "StateName": "state",
    "ZipCode": "ZIP code",
}
AROUND = " ,.;()"  # what an answer does not begin or end with


def prepare() -> None:
    """Prepare questions about addresses in the form of SQuAD. Those about the 300 held-out addresses are held out."""
    prepare_missing(addresses)
    for path, source in ((QUESTIONS_VAL, ADDRESSES_VAL), (QUESTIONS_TRAIN, ADDRESSES_TRAIN)):
        questions = list(as_questions(map(json.loads, source.read_text(encoding="utf-8").splitlines())))
        random.Random(0).shuffle(questions)  # the first ones then ask about many addresses
        write_jsonl(path, questions)


def as_questions(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Make a question for each label that is on consecutive words of an address and nowhere else in it."""
    for row in rows:
        found: dict[str, list[tuple[int, int]]] = {}
        start = 0
        for label, words in itertools.groupby(zip(row["tags"], row["tokens"], strict=True), key=lambda pair: pair[0]):
            end = start + len(" ".join(word for _, word in words))
            found.setdefault(label, []).append((start, end))
            start = end + 1
        context = " ".join(row["tokens"])
        for label, spans in found.items():
            if label in _NAMES and len(spans) == 1:
                yield _question(_NAMES[label], context, *spans[0])


def _question(name: str, context: str, start: int, end: int) -> dict[str, Any]:
    start = end - len(context[start:end].lstrip(AROUND))
    answer = {"text": [context[start:end].rstrip(AROUND)], "answer_start": [start]}
    return {"question": f"Which part is the {name}?", "context": context, "answers": answer}
