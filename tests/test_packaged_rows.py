"""Rows that are made from the labels and definitions of packages."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))

from packaged.addresses import as_rows
from packaged.choices import as_choices
from packaged.digits import save_png
from packaged.preferences import without_texts_of
from packaged.pronunciations import without_forms_of
from packaged.questions import as_questions

ADDRESS = {
    "tokens": ["12", "Old", "Mill", "Rd.", "#4,", "(Rock", "Hill),", "SC"],
    "tags": ["AddressNumber", *["StreetName"] * 2, "StreetNamePostType", "OccupancyIdentifier", *["PlaceName"] * 2,
             "StateName"],
}  # fmt: skip


def test_addresses_are_words_with_labels_and_no_address_comes_twice() -> None:
    texts = ["<A><Number>1</Number> <Street> Elm</Street></A>", "<A><Number>1</Number> <Street>ELM,</Street></A>",
             "<A><Street>Elm</Street></A>", "<A><Number>#1</Number> <Street>El</Street><Street>m.</Street></A>",
             ]  # fmt: skip
    assert as_rows(map(ElementTree.fromstring, texts)) == [
        {"tokens": ["1", "Elm"], "tags": ["Number", "Street"]},
        {"tokens": ["Elm"], "tags": ["Street"]},
    ]


def test_the_answers_to_questions_about_an_address_are_its_parts_without_punctuation() -> None:
    rows = list(as_questions([ADDRESS]))
    assert {row["context"] for row in rows} == {"12 Old Mill Rd. #4, (Rock Hill), SC"}
    answers = {row["question"][len("Which part is the ") : -1]: row["answers"] for row in rows}
    assert {name: answer["text"][0] for name, answer in answers.items()} == {
        "house number": "12",
        "street name": "Old Mill",
        "kind of street after its name": "Rd",
        "number of the unit": "#4",
        "city": "Rock Hill",
        "state": "SC",
    }
    for row in rows:
        (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert row["context"][start:].startswith(text)


def test_no_question_asks_for_a_label_in_two_places() -> None:
    row = {"tokens": ["Elm", "5", "Street"], "tags": ["StreetName", "AddressNumber", "StreetName"]}
    assert [each["question"] for each in as_questions([row])] == ["Which part is the house number?"]


def test_each_sentence_of_praise_is_among_three_others_and_none_comes_twice() -> None:
    sentences = [(f"good {n}", 1) for n in range(20)] + [(f"bad {n}", 0) for n in range(50)]
    rows = list(as_choices(sentences))
    assert len(rows) == 16  # 50 sentences of criticism suffice for 16 rows
    assert all(row["choices"][row["label"]].startswith("good") for row in rows)
    texts = [text for row in rows for text in row["choices"]]
    assert len(set(texts)) == len(texts) == 64
    assert {row["label"] for row in rows} == {0, 1, 2, 3}


def test_no_text_of_a_held_out_preference_is_in_training_rows() -> None:
    held_out = [("How was it?", "Good. And you?", "I ran.")]
    apart = ("How was the day?", "Good! And yours?", "I walked.")
    near = [("how was it", "a?", "b"), ("a", "good and you!", "b"), ("a", "b?", "I ran"), ("I ran!", "a?", "b")]
    assert without_texts_of(held_out, [*near, apart]) == [apart]


def test_no_form_of_a_held_out_word_with_s_or_an_apostrophe_is_in_training_rows() -> None:
    words = ["cat", "cats", "cat's", "cats'", "catsup", "boss", "boss's", "boss'", "bosses", "'tis", "tis"]
    rows = [(word, "") for word in words]
    assert without_forms_of([("cats", ""), ("boss", ""), ("tis", "")], rows) == [("catsup", ""), ("bosses", "")]


def test_a_digit_is_saved_from_black_to_white(tmp_path: Path) -> None:
    save_png(tmp_path / "3" / "0.png", np.arange(64) % 17)
    pixels = np.asarray(Image.open(tmp_path / "3" / "0.png"))
    assert pixels.shape == (8, 8)
    assert (pixels[0, 0], pixels[1, 7], pixels[2, 0]) == (0, 239, 255)
