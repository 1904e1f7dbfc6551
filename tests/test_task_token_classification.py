"""The task that gives each word a tag."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ByT5Tokenizer, EvalPrediction, GPT2Tokenizer

from ftaccum import DataError, SettingsError, TextWarning, load_task, test_fine_tuning
from ftaccum.tasks.arguments import TrainedArguments
from ftaccum.tasks.entities import entities, entity_scores, mark_entities
from ftaccum.tasks.fast_tokenizer import check_fast
from ftaccum.tasks.tagged_words import TaggedWords
from ftaccum.tasks.token_classification import TagMetrics
from ftaccum.tasks.trained import load_trained
from task_files import piece_tokenizer, save_encoder, save_rows, task_errors

NAMES = ["O", "B-LOC", "I-LOC", "B-PER"]
ROWS: list[dict[str, Any]] = [
    {"tokens": ["Ann", "lives", "in", "New", "York", "."], "tags": ["B-PER", "O", "O", "B-LOC", "I-LOC", "O"]},
    {"tokens": ["Bobby"], "tags": ["B-PER"]},
    {"tokens": ["the", "citys", "was", "Anns"], "tags": ["O", "O", "O", "B-PER"]},
    {"tokens": ["Yorkland", "and", "York"], "tags": ["B-LOC", "O", "B-LOC"]},
    {"tokens": ["old", "New", "York"], "tags": ["O", "B-LOC", "I-LOC"]},
    {"tokens": ["who", "was", "Bobby", "?"], "tags": ["O", "O", "B-PER", "O"]},
    {"tokens": ["where", "was", "the", "big", "Yorkland", "?"], "tags": ["O", "O", "O", "O", "B-LOC", "O"]},
]
QUIET = {"progress": False, "verbosity": "quiet", "n_epochs": 1}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("encoder"), piece_tokenizer())


def by_word_ids(rows: list[dict[str, Any]]) -> tuple[Any, Tensor]:
    """Return a padded batch and its labels, made with the tokenizer's own word ids."""
    batch = piece_tokenizer()(
        [row["tokens"] for row in rows], is_split_into_words=True, padding=True, return_tensors="pt"
    )
    labels = torch.full_like(batch["input_ids"], -100)
    for n, row in enumerate(rows):
        words = batch.word_ids(n)
        for place, word in enumerate(words):
            if word is not None and word not in words[:place]:
                labels[n, place] = NAMES.index(row["tags"][word])
    return batch, labels


def test_tags_train_exactly_and_are_saved_in_the_config(encoder: str, tmp_path: Path) -> None:
    def loss(model: nn.Module, window: list[dict[str, Any]]) -> Tensor:
        batch, labels = by_word_ids(window)
        return F.cross_entropy(model(**batch).logits.transpose(1, 2), labels)

    file = save_rows(tmp_path / "rows.jsonl", ROWS)
    assert max(task_errors("token-classification", encoder, file, ROWS, loss)) < 1e-12
    config = load_task("token-classification", encoder, file).model.config
    assert config.id2label == dict(enumerate(NAMES))
    assert config.label2id == {name: n for n, name in enumerate(NAMES)}


def as_class_labels(names: list[str], folder: Path) -> str:
    features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=names))})
    Dataset.from_list(ROWS, features=features).save_to_disk(folder)
    return str(folder)


def test_forms_of_tags_give_the_same_labels(encoder: str, tmp_path: Path) -> None:
    wanted = by_word_ids(ROWS)[1]
    texts = [{name: " ".join(values) for name, values in row.items()} for row in ROWS]
    numbers = [{"words": row["tokens"], "labels": [NAMES.index(tag) for tag in row["tags"]]} for row in ROWS]
    files = [
        save_rows(tmp_path / "lists.jsonl", ROWS),
        save_rows(tmp_path / "texts.jsonl", texts),
        save_rows(tmp_path / "numbers.jsonl", numbers),
        as_class_labels(NAMES, tmp_path / "saved"),
    ]
    for file, names in zip(files, [NAMES, NAMES, ["0", "1", "2", "3"], NAMES], strict=True):
        loaded = load_task("token-classification", encoder, file)
        assert list(loaded.model.config.id2label.values()) == names
        for n, labels in enumerate(loaded.train["labels"]):
            assert labels == wanted[n, : len(labels)].tolist()


def test_class_numbers_of_validation_rows_are_read_by_their_own_names(encoder: str, tmp_path: Path) -> None:
    train = save_rows(tmp_path / "rows.jsonl", ROWS)
    saved = as_class_labels(NAMES[::-1], tmp_path / "saved")
    loaded = load_task("token-classification", encoder, train, saved)
    assert loaded.val is not None
    assert loaded.val["labels"][:] == loaded.train["labels"][:]
    assert list(load_task("token-classification", encoder, saved).model.config.id2label.values()) == NAMES[::-1]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "row 1 has 2 words, but 1 tags. Fix or drop the row."),
        ({"tokens": ["a", None], "tags": ["O", "O"]}, "row 1 has ['a', None] instead of its words"),
        ({"tokens": None, "tags": ["O"]}, "row 1 has None instead of its words"),
        ({"tokens": ["a"], "tags": None}, "row 1 has None instead of a tag for each word"),
        ({"tokens": ["a"], "tags": [None]}, "row 1 has [None] instead of a tag for each word"),
    ],
)
def test_a_row_that_does_not_fit_is_named_before_the_model_is_loaded(
    tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    file = save_rows(tmp_path / "rows.jsonl", [ROWS[0], row])
    with pytest.raises(DataError) as caught:
        load_task("token-classification", "/absent", file)
    assert f"In `train_data`, {words}" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tokens": ["a"], "tags": [0.5]}, "The column of tags in `train_data` holds List(Value('float64'))"),
        ({"tokens": [1], "tags": ["O"]}, "must hold lists of words, or texts of words separated by spaces. Name the"),
        ({"tokens": "a", "tags": 1}, "Name the column: `--columns tags=NAME` (in Python: `columns='tags=NAME'`)."),
        ({"tokens": "['a', 'b']", "tags": "['O', 'O']"}, "holds lists that were written as text, such as"),
        ({"tokens": ["a"], "tags": [-100]}, "have no tags at all"),
        ({"tokens": ["a"], "tags": [-1]}, "row 0 has [-1] instead of a tag"),
        ({"tokens": ["a"]}, "`train_data` has no column 'ner_tags' or 'tags' or 'labels' or 'pos_tags' for the tags"),
    ],
)
def test_columns_of_another_kind_are_refused(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        load_task("token-classification", "/absent", save_rows(tmp_path / "rows.jsonl", [row]))
    assert words in str(caught.value)


def test_a_validation_tag_that_training_lacks_is_named(encoder: str, tmp_path: Path) -> None:
    train = save_rows(tmp_path / "rows.jsonl", ROWS)
    val = save_rows(tmp_path / "val.jsonl", [ROWS[0], {"tokens": ["Ann"], "tags": ["B-ORG"]}])
    with pytest.raises(DataError, match="In `val_data`, row 1 has the tag 'B-ORG', which is none of those that the"):
        load_task("token-classification", encoder, train, val)


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(SettingsError, match="ByT5Tokenizer is a slow tokenizer"):
        check_fast(ByT5Tokenizer(), "token-classification")
    check_fast(piece_tokenizer(), "token-classification")


def test_words_that_are_cut_off_or_have_no_tokens_are_not_labelled(encoder: str, tmp_path: Path) -> None:
    rows = [*ROWS, {"tokens": ["", "\u200b", "Ann"], "tags": ["O", "O", "B-PER"]}, {"tokens": [], "tags": []}]
    file = save_rows(tmp_path / "rows.jsonl", rows)
    with pytest.warns(TextWarning) as caught:
        loaded = load_task("token-classification", encoder, file, max_length=6)
    cut, empty = (str(warning.message) for warning in caught)
    assert "In `train_data`, 3 of 9 rows (the first is row 0) are longer than 6 tokens" in cut
    assert "In `train_data`, 1 of 9 rows (the first is row 8) have no word with a tag" in empty
    assert loaded.train["labels"][0] == [-100, 3, 0, 0, 1, -100]
    assert loaded.train["labels"][2] == [-100, 0, 0, -100, 0, -100]
    assert loaded.train["labels"][7] == [-100, 3, -100]
    assert loaded.tokenizer.backend_tokenizer.truncation is None, "it is saved with the model"
    columns = loaded.task.predicted_columns(np.full((9, 6), 2), Dataset.from_list(rows), loaded.tokenizer, loaded.model)
    assert columns["prediction"][0] == ["I-LOC"] * 4 + [None] * 2
    assert columns["prediction"][7:] == [[None, None, "I-LOC"], []]


def test_a_tokenizer_that_marks_words_by_their_space_sees_it() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: n for n, piece in enumerate([*letters, "Ġc", "Ġcd"])}
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=[("Ġ", "c"), ("Ġc", "d")])
    encoded = TaggedWords(tokenizer, None, {"A": 0, "B": 1})({"tokens": [["ab", "cd", "e"]], "tags": [["A", "B", "A"]]})
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"][0]) == ["a", "b", "Ġcd", "Ġ", "e"]
    assert encoded["labels"] == [[0, -100, 1, -100, 0]]


def test_metrics_count_the_first_token_of_each_word_and_match_the_predictions(encoder: str, tmp_path: Path) -> None:
    file = save_rows(tmp_path / "rows.jsonl", ROWS)
    loaded = load_task("token-classification", encoder, file, file)
    result = test_fine_tuning(**loaded.arguments(), **{**QUIET, "n_epochs": 6}, learning_rate=2e-2, eval_batch_size=2)
    loaded.model.eval()
    with torch.no_grad():
        best = loaded.model(**by_word_ids(ROWS)[0]).logits.argmax(-1)
    rows = Dataset.from_list(ROWS)
    named = loaded.task.predicted_columns(best, rows, loaded.tokenizer, loaded.model)["prediction"]
    right = np.concatenate(named) == np.concatenate(rows["tags"][:])
    wanted = entity_scores(rows["tags"], named) | {"accuracy": right.mean()}
    assert result.metrics[-1] == pytest.approx(wanted)
    assert wanted["f1"] > 0.3, "it has learned something"


def test_a_trained_model_reads_tags_by_its_own_names_and_predicts_without_them(encoder: str, tmp_path: Path) -> None:
    loaded = load_task("token-classification", encoder, save_rows(tmp_path / "rows.jsonl", ROWS))
    for part in (loaded.model, loaded.tokenizer):
        part.save_pretrained(tmp_path / "model")
    settings = {"text_columns": None, "max_length": None, "add_eos_token": None}
    few = TrainedArguments(data=save_rows(tmp_path / "few.jsonl", ROWS[1:3]), task="token-classification")
    trained = load_trained(str(tmp_path / "model"), few, settings, needs_targets=True)
    assert trained.encoded["labels"][:] == loaded.train["labels"][1:3]
    other = [{**row, "tags": ["?"]} for row in ROWS]
    few = TrainedArguments(data=save_rows(tmp_path / "other.jsonl", other), task="token-classification")
    assert "labels" not in load_trained(str(tmp_path / "model"), few, settings, needs_targets=False).encoded.features


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-A I-A O I-B I-B B-B", {("A", 0, 1), ("B", 3, 4), ("B", 5, 5)}),
        ("S-A I-A E-A O", {("A", 0, 0), ("A", 1, 2)}),
        ("O E-B B-A I-B", {("B", 1, 1), ("A", 2, 2), ("B", 3, 3)}),
        ("B-A L-A U-A I-A", {("A", 0, 1), ("A", 2, 2), ("A", 3, 3)}),
        ("B I O B-A-x", {("", 0, 1), ("A-x", 3, 3)}),
        ("O O", set()),
    ],
)
def test_entities_begin_and_end_as_in_conlleval(tags: str, found: set[Any]) -> None:
    assert entities(tags.split()) == found


def test_entity_scores_are_those_of_seqeval() -> None:
    # The example of seqeval's README, and what seqeval 1.2.2 returns for three rows of mixed schemes.
    wanted = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    predicted = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    assert entity_scores(wanted, predicted) == {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    wanted = [tags.split() for tags in ("B-A I-A O I-B I-B B-B", "S-A I-A E-A O", "O E-B B-A I-B")]
    predicted = [tags.split() for tags in ("B-A I-A O B-B I-B I-B", "S-A B-A E-A O", "O S-B I-A I-B")]
    expected = {"precision": 0.8571428571428571, "recall": 0.75, "f1": 0.8}
    assert entity_scores(wanted, predicted) == pytest.approx(expected)
    assert entity_scores([["O"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_plain_tags_have_the_mean_of_their_f1() -> None:
    assert not mark_entities(["O", "NOUN", "B-PER"])
    wanted, predicted = np.array([[0, 1, 1, -100], [2, -100, -100, -100]]), np.array([[0, 1, 0, 2], [2, 1, 1, 1]])
    found = TagMetrics(("ADJ", "NOUN", "VERB"))(EvalPrediction(predicted, wanted))
    assert found == {
        "accuracy": pytest.approx(3 / 4),
        "precision": pytest.approx((1 / 2 + 1 + 1) / 3),
        "recall": pytest.approx((1 + 1 / 2 + 1) / 3),
        "f1": pytest.approx((2 / 3 + 2 / 3 + 1) / 3),
    }
