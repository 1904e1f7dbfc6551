"""Models and data from packages: what is prepared, and how raw data become rows."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))

import packaged
from packaged.chats import as_messages
from packaged.words import as_pairs


def raw(*turns: str) -> dict[str, Any]:
    """Return a conversation in the form of the data package. A turn is "author: line / line"."""
    parted = [turn.split(": ", 1) for turn in turns]
    return {"messages": [[{"sender": who, "text": text} for text in lines.split("/")] for who, lines in parted]}


def test_consecutive_texts_of_one_author_are_one_message() -> None:
    def contents(*turns: str) -> list[str]:
        messages = as_messages(raw(*turns))
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        return [m["content"] for m in messages]

    assert contents("a: Hi / how are you", "b: fine", "a: good", "b: bye") == ["Hi\nhow are you", "fine", "good", "bye"]
    assert contents("a: Hi", "a: there", "b: yes") == ["Hi\nthere", "yes"]
    assert contents("a: Hi", "b:  / ", "a: there", "b: yes /  / you") == ["Hi\nthere", "yes\nyou"]
    assert contents("a:  ", "b: Hi", "a: hello") == ["Hi", "hello"]
    assert contents("a: Hi", "b: yes", "a: anyone?") == ["Hi", "yes"]
    assert contents("a: Hi") == contents() == []


def test_a_definition_and_a_word_are_in_one_pair_at_most() -> None:
    definitions = {
        "jet": ["a fast aircraft with jet engines", "a very hard kind of coal", "black"],
        "aeroplane": ["a machine that flies with wings", "an aeroplane that someone flies"],
        "plane": ["a machine that flies with wings", "a tool that makes wood smooth"],
        "rare": ["a word without any frequency"],
        "fly": ["to move through the air "],
    }
    pairs = as_pairs(definitions, {"jet": 5, "aeroplane": 2, "plane": 9, "fly": 1})
    assert sorted(pairs) == [
        ("a machine that flies with wings", "plane"),
        ("a very hard kind of coal", "jet"),
        ("to move through the air", "fly"),
    ]


def test_only_files_that_are_named_and_missing_are_prepared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prepared: list[str] = []

    def source(*names: str) -> SimpleNamespace:
        return SimpleNamespace(
            PATHS=tuple(tmp_path / name for name in names), prepare=lambda: prepared.append(names[0])
        )

    monkeypatch.setattr(packaged, "CACHE", tmp_path)
    monkeypatch.setattr(packaged, "_SOURCES", (source("model"), source("train.csv", "val.csv")))
    packaged.prepare("org/model", "rows.jsonl", None, 3, ["a list"])
    assert prepared == []
    packaged.prepare(str(tmp_path / "val.csv"), tmp_path / "train.csv")
    assert prepared == ["train.csv"]
    for name in ("train.csv", "val.csv"):
        (tmp_path / name).touch()
    packaged.prepare(tmp_path / "model", tmp_path / "train.csv")
    assert prepared == ["train.csv", "model"]
