"""The task that answers questions with parts of a text."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from ftaccum import DataError, SettingsError, TextWarning, load_task, test_fine_tuning
from ftaccum.tasks.answer_scores import exact_match, f1
from ftaccum.tasks.answer_spans import best_answers
from ftaccum.tasks.context_windows import ContextWindows
from ftaccum.tasks.tagged_words import TaggedWords
from silent_errors.text_columns import TINY
from task_files import PIECES, piece_tokenizer, save_encoder, save_rows, task_errors

CONTEXTS = [
    "Ann lives in New York.",
    "Bobby was in the big old city, and Ann lives in the old Yorkland, the big city.",
    "the city was old",
    "Ann and Bobby was in New York and in the big city and in old Yorkland and the Yorkland city was big and old.",
    "who lives in the city?",
]
ASKED: list[tuple[int, str, str | None]] = [
    (0, "where lives Ann?", "New York"),
    (1, "where was Bobby?", "big old city"),
    (2, "who?", None),
    (3, "where?", "New York"),
    (3, "who was in the big old city?", "Bobby"),
    (4, "where?", "city"),
]
ROWS: list[dict[str, Any]] = [
    {
        "question": question,
        "context": CONTEXTS[n],
        "answers": {"text": [answer], "answer_start": [CONTEXTS[n].index(answer)]}
        if answer
        else {"text": [], "answer_start": []},
    }
    for n, question, answer in ASKED
]
QUIET = {"progress": False, "verbosity": "quiet", "n_epochs": 1}
LIMIT, SHARED = 20, 3


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("encoder"), piece_tokenizer(), initializer_range=0.6)


def windows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the windows of rows, cut by hand: ids, the length of the question's part, and the tokens of the answer."""
    tokenizer, cut = piece_tokenizer(), []
    for n, row in enumerate(rows):
        question = tokenizer(row["question"])["input_ids"]
        context = tokenizer(row["context"], add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = context["input_ids"], context["offset_mapping"]
        room, start = LIMIT - len(question) - 1, 0
        while True:
            part = slice(start, start + room)
            places = offsets[part]
            tokens = [0, 0]
            for text, begin in zip(*(row["answers"][name][:1] for name in ("text", "answer_start")), strict=True):
                covered = [k for k, (a, b) in enumerate(places) if a < begin + len(text) and b > begin]
                if covered and places[0][0] <= begin and begin + len(text) <= places[-1][1]:
                    tokens = [len(question) + covered[0], len(question) + covered[-1]]
            row_ids = [*question, *ids[part], PIECES.index("[SEP]")]
            cut.append({"row": n, "ids": row_ids, "first": len(question), "places": places, "tokens": tokens})
            if start + room >= len(ids):
                break
            start += room - SHARED
    return cut


def batch_of(windows: list[dict[str, Any]]) -> dict[str, Tensor]:
    width = max(len(window["ids"]) for window in windows)
    made = {name: torch.zeros(len(windows), width, dtype=torch.long) for name in ("input_ids", "token_type_ids")}
    made["attention_mask"] = torch.zeros_like(made["input_ids"])
    for n, window in enumerate(windows):
        length = len(window["ids"])
        made["input_ids"][n, :length] = torch.tensor(window["ids"])
        made["attention_mask"][n, :length] = 1
        made["token_type_ids"][n, window["first"] : length] = 1
    return made


def test_windows_of_long_contexts_train_exactly(encoder: str, tmp_path: Path) -> None:
    def loss(model: nn.Module, window: list[dict[str, Any]]) -> Tensor:
        starts, ends = torch.tensor([each["tokens"] for each in window]).T
        return model(**batch_of(window), start_positions=starts, end_positions=ends).loss

    file, cut = save_rows(tmp_path / "rows.jsonl", ROWS), windows(ROWS)
    assert len(cut) % 5, "a remainder"
    assert len({len(window["ids"]) for window in cut}) > 2
    options = {"max_length": LIMIT, "doc_stride": SHARED}
    loaded = load_task("question-answering", encoder, file, validation_split=0.0, **options)
    assert loaded.train["input_ids"][:] == [window["ids"] for window in cut]
    places = zip(loaded.train["start_positions"], loaded.train["end_positions"], strict=True)
    assert list(map(list, places)) == [window["tokens"] for window in cut]
    assert loaded.tokenizer.backend_tokenizer.truncation is None, "it is saved with the model"
    assert max(task_errors("question-answering", encoder, file, cut, loss, **options)) < 1e-12


def best_by_hand(cut: list[dict[str, Any]], starts: np.ndarray, ends: np.ndarray, row: int) -> tuple[str, float]:
    """Return the most probable answer to a row among all pairs of tokens, and its probability."""
    found, nothing = [("", -math.inf)], []
    for n, window in enumerate(cut):
        if window["row"] != row:
            continue
        tokens = [0, *range(window["first"], len(window["ids"]) - 1)]
        logs = [each[n, tokens] - np.log(np.exp(each[n, tokens]).sum()) for each in (starts, ends)]
        nothing.append(logs[0][0] + logs[1][0])
        for i, j in product(range(1, len(tokens)), repeat=2):
            if i <= j < i + 30:
                text = ROWS[row]["context"][window["places"][i - 1][0] : window["places"][j - 1][1]]
                found.append((text, logs[0][i] + logs[1][j]))
    best = max(found, key=lambda each: each[1])
    return (best[0], math.exp(best[1])) if best[1] >= min(nothing) else ("", math.exp(min(nothing)))


def test_the_best_part_of_all_windows_is_the_answer(encoder: str, tmp_path: Path) -> None:
    file, cut = save_rows(tmp_path / "rows.jsonl", ROWS), windows(ROWS)
    loaded = load_task("question-answering", encoder, file, max_length=LIMIT, doc_stride=SHARED)
    draw = np.random.default_rng(0)
    answers = []
    for k in range(6):
        starts, ends = (draw.normal(scale=3, size=(len(cut), LIMIT + 2)) for _ in range(2))
        starts[:, 0] += 4 * (k % 2)
        # Padding has the highest scores, and does not count.
        for n, window in enumerate(cut):
            starts[n, len(window["ids"]) :] = ends[n, len(window["ids"]) :] = 99
        rows = Dataset.from_list(ROWS)
        found = loaded.task.predicted_columns((starts, ends), rows, loaded.tokenizer, loaded.model)
        wanted = [best_by_hand(cut, starts, ends, row) for row in range(len(ROWS))]
        assert found["prediction"] == [text for text, _ in wanted]
        assert found["score"] == pytest.approx([score for _, score in wanted])
        answers += found["prediction"]
    assert "" in answers
    assert len(set(answers)) > 9


def test_an_answer_has_at_most_thirty_tokens() -> None:
    n = 50
    window = {"row": 0, "first": 1, "begins": list(range(n)), "ends": list(range(1, n + 1)), "nowhere": 0}
    starts, ends = np.zeros((1, n + 1)), np.zeros((1, n + 1))
    starts[0, 1], ends[0, 31], ends[0, 30] = 9, 9, 8
    assert best_answers((starts, ends), Dataset.from_list([window]))[0].end == 30


def test_a_part_that_validates_is_held_out_by_rows(encoder: str, tmp_path: Path) -> None:
    file = save_rows(tmp_path / "rows.jsonl", ROWS)
    options = {"max_length": LIMIT, "doc_stride": SHARED, "validation_split": 0.5}
    loaded = load_task("question-answering", encoder, file, **options)
    cut = windows(ROWS)
    assert loaded.val is not None
    held = loaded.val["input_ids"][:]
    of_rows = [{window["row"] for window in cut if (window["ids"] in held) == is_held} for is_held in (True, False)]
    assert len(of_rows[0]) == 3
    assert not of_rows[0] & of_rows[1]
    assert len(held) + len(loaded.train) == len(cut)
    result = test_fine_tuning(**loaded.arguments(), **QUIET)
    assert result.metrics[-1].keys() == {"exact_match", "f1"}


def test_metrics_are_those_of_the_predicted_answers(encoder: str, tmp_path: Path) -> None:
    file = save_rows(tmp_path / "rows.jsonl", ROWS)
    loaded = load_task("question-answering", encoder, file, file, max_length=LIMIT, doc_stride=SHARED)
    # Small batches have other widths than the whole.
    changed = {**QUIET, "n_epochs": 8, "learning_rate": 2e-2, "batch_size": 2, "eval_batch_size": 2}
    result = test_fine_tuning(**loaded.arguments(), **changed)
    loaded.model.eval()
    with torch.no_grad():
        outputs = loaded.model(**batch_of(windows(ROWS)))
    logits = (outputs.start_logits.numpy(), outputs.end_logits.numpy())
    rows = Dataset.from_list(ROWS)
    answers = loaded.task.predicted_columns(logits, rows, loaded.tokenizer, loaded.model)["prediction"]
    right = [row["answers"]["text"] for row in ROWS]
    wanted = {score.__name__: np.mean(list(map(score, answers, right))) for score in (exact_match, f1)}
    assert result.metrics[-1] == pytest.approx(wanted)
    assert wanted["f1"] > 0.3, "it has learned something"


def test_forms_of_answers_give_the_same_positions(encoder: str, tmp_path: Path) -> None:
    pairs = [(row, row["answers"]) for row in ROWS]
    forms: dict[str, list[dict[str, Any]]] = {
        "dicts": ROWS,
        "lists": [
            {
                **row,
                "answers": [
                    {"text": text, "answer_start": start}
                    for text, start in zip(each["text"], each["answer_start"], strict=True)
                ],
            }
            for row, each in pairs
        ],
        "columns": [
            {
                "query": row["question"],
                "passage": row["context"],
                "answer": (each["text"] or [None])[0],
                "answer_start": (each["answer_start"] or [-1])[0],
            }
            for row, each in pairs
        ],
    }
    first = load_task("question-answering", encoder, save_rows(tmp_path / "first.jsonl", ROWS))
    for name, rows in forms.items():
        found = load_task("question-answering", encoder, save_rows(tmp_path / f"{name}.jsonl", rows)).train
        for column in ("input_ids", "start_positions", "end_positions"):
            assert found[column][:] == first.train[column][:], name


def test_an_answer_without_its_place_is_looked_for(encoder: str, tmp_path: Path) -> None:
    once = [
        {**ROWS[0], "answers": {"text": ["New York"], "answer_start": [0]}},
        {**ROWS[0], "answers": {"text": ["New York"], "answer_start": [None]}},
        ROWS[0],
    ]
    file = save_rows(tmp_path / "rows.jsonl", once)
    with pytest.warns(
        TextWarning, match=r"`train_data`, 1 of 3 rows \(the first is row 0\) have an answer that does not"
    ):
        loaded = load_task("question-answering", encoder, file, validation_split=0.0)
    assert loaded.train["start_positions"][:] == [9, 9, 9]
    assert loaded.train["end_positions"][:] == [10, 10, 10]


def test_spaces_around_an_answer_do_not_count(encoder: str, tmp_path: Path) -> None:
    context = "Ann lives in New York "
    rows = [{**ROWS[0], "context": context, "answers": {"text": [" New York "], "answer_start": [12]}}, ROWS[0]]
    loaded = load_task("question-answering", encoder, save_rows(tmp_path / "rows.jsonl", rows), validation_split=0.0)
    assert loaded.train["start_positions"][:] == [9, 9]
    assert loaded.train["end_positions"][:] == [10, 10]


def test_an_answer_that_no_window_contains_is_reported(encoder: str, tmp_path: Path) -> None:
    long = {**ROWS[3], "answers": {"text": [CONTEXTS[3][:-1]], "answer_start": [0]}}
    file = save_rows(tmp_path / "rows.jsonl", [ROWS[0], long, ROWS[2]])
    words = r"`train_data`, 1 of 3 rows \(the first is row 1\) have an answer that no window contains as a whole"
    with pytest.warns(TextWarning, match=words):
        load_task("question-answering", encoder, file, max_length=LIMIT, doc_stride=SHARED, validation_split=0.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"answers": {"text": ["Paris"], "answer_start": [3]}},
            "have an answer that cannot be found. The first is row 1",
        ),
        ({"answers": {"text": ["in"], "answer_start": [1]}}, "its context contains 2 times 'in', and `answer_start`"),
        ({"answers": {"text": ["in", "New York"], "answer_start": [3]}}, r"row 1 has {.*'text': \['in', 'New York'\]"),
        ({"question": None}, "row 1 has None instead of a text as its question. Name the column"),
        ({"context": None}, "row 1 has None instead of a text as its context"),
    ],
)
def test_a_row_that_does_not_fit_is_named_before_the_model_is_loaded(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    row = {**ROWS[0], "context": "in New York in the city", "answers": {"text": ["city"], "answer_start": [19]}}
    file = save_rows(tmp_path / "rows.jsonl", [ROWS[0], {**row, **change}])
    with pytest.raises(DataError, match=words):
        load_task("question-answering", "/absent", file)


def test_answers_of_another_kind_are_refused(tmp_path: Path) -> None:
    file = save_rows(tmp_path / "rows.jsonl", [{**ROWS[0], "answers": 3}])
    with pytest.raises(
        DataError, match="row 0 has 3 as its answers, but answers are a text, with its first character in"
    ):
        load_task("question-answering", "/absent", file)


def test_a_question_that_leaves_no_room_is_named(encoder: str, tmp_path: Path) -> None:
    long = {**ROWS[0], "question": "where " * 12 + "?"}
    file = save_rows(tmp_path / "rows.jsonl", [ROWS[1], long])
    with pytest.raises(
        DataError, match="row 1 has a question so long that 4 of 20 tokens are left for its context, but"
    ):
        load_task("question-answering", encoder, file, max_length=20)
    with pytest.raises(
        SettingsError, match="`doc_stride` is an option of the task 'question-answering', but `task` is"
    ):
        load_task("text-classification", encoder, file, doc_stride=3)


def test_a_checkpoint_with_other_classes_gets_a_new_head(tmp_path: Path) -> None:
    BertForSequenceClassification(BertConfig(**TINY, num_labels=5)).save_pretrained(tmp_path)
    piece_tokenizer().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["id2label"].keys() == set("01234")
    loaded = load_task("question-answering", str(tmp_path), save_rows(tmp_path / "rows.jsonl", ROWS))
    test_fine_tuning(**loaded.arguments(), **QUIET, max_updates=1)


def test_windows_know_their_rows_in_any_batch() -> None:
    batch = {"question": ["who?"] * 2, "context": CONTEXTS[1:3]}
    assert ContextWindows(piece_tokenizer(), LIMIT, SHARED)(batch, [1000, 1001])["row"] == [1000, 1000, 1001]


def test_functions_that_tokenise_keep_their_hash_so_that_tokens_are_found_again() -> None:
    tokenizer = piece_tokenizer()
    encoders: list[Any] = [ContextWindows(tokenizer, LIMIT, SHARED), TaggedWords(tokenizer, LIMIT, {"O": 0})]
    batch = {"question": ["who?"], "context": CONTEXTS[1:2], "tokens": [["Ann"]], "tags": [["O"]]}
    before = [Hasher.hash(encoder) for encoder in encoders]
    for encoder in encoders:
        encoder(batch, [0])
    assert [Hasher.hash(encoder) for encoder in encoders] == before


@pytest.mark.parametrize(
    ("predicted", "right", "exact", "overlap"),
    [
        ("the Denver Broncos!", ["Denver Broncos"], 1, 1),
        ("Santa Clara, California", ["Levi's Stadium", "Santa Clara"], 0, 0.8),
        ("in the the city", ["city in"], 0, 1),
        ("york york", ["New York", "york"], 0, 2 / 3),
        ("", [], 1, 1),
        ("York", [], 0, 0),
        ("", ["York"], 0, 0),
    ],
)
def test_scores_of_answers_follow_their_definition(
    predicted: str, right: list[str], exact: float, overlap: float
) -> None:
    assert exact_match(predicted, right) == exact
    assert f1(predicted, right) == pytest.approx(overlap)
