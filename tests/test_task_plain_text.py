"""The tasks `causal-lm` and `masked-lm`: which column they read, packed rows, masks, and their gradients."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForCausalLM, BartConfig, BertConfig, BertForMaskedLM, EvalPrediction, XLNetConfig

from exactness import accumulated_gradients, windows_of
from ftaccum import DataError, SettingsError, TextWarning, load_task, test_fine_tuning
from ftaccum.apps.cli import main
from ftaccum.tasks.packed_rows import pack
from ftaccum.tasks.reading_direction import faults_of_reading_direction
from ftaccum.tasks.token_accuracy import TokenAccuracy
from heads import all_in_float64, relative_error
from silent_errors.text_columns import REVIEWS, TINY, WORDS, causal_lm, word_tokenizer

LENGTHS = [len(text.split()) + 1 for text in REVIEWS]  # with the end-of-text token


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write(tmp_path / "rows.jsonl", [{"text": text, "label": n % 2} for n, text in enumerate(REVIEWS)])


@pytest.fixture
def lm(tmp_path: Path) -> str:
    """Save a tiny Llama in float64."""
    causal_lm().save_pretrained(tmp_path / "lm")
    word_tokenizer().save_pretrained(tmp_path / "lm")
    return str(tmp_path / "lm")


@pytest.fixture
def bert(tmp_path: Path) -> str:
    """Save a tiny BERT in float64, without dropout, whose tokenizer masks with a word of its own."""
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "row0"})
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**TINY, **off)).double().save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def write(file: Path, rows: Sequence[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def documents(packed: Sequence[Any]) -> list[list[int]]:
    """Return the documents of packed rows, and parts of those that continue in another row."""
    parts: list[list[int]] = []
    for row in packed:
        for token, position in zip(row["input_ids"], row["position_ids"], strict=True):
            if not position:
                parts.append([])
            assert position == len(parts[-1])
            parts[-1].append(token)
    return parts


def test_packed_rows_hold_all_tokens_in_order(lm: str, rows: str) -> None:
    loaded = load_task("causal-lm", lm, rows, packing=True, max_length=6, validation_split=0.0)
    assert [len(row["input_ids"]) for row in loaded.train] == [6] * (sum(LENGTHS) // 6) + [sum(LENGTHS) % 6]
    tokens = list(chain(*(row["input_ids"] for row in loaded.train)))
    words = [word for text in REVIEWS for word in (*text.split(), "</s>")]
    assert [WORDS[token] for token in tokens] == words
    assert all(row["labels"] == row["input_ids"] for row in loaded.train)
    ends = set(np.cumsum(LENGTHS)) | set(range(0, len(words), 6)) | {len(words)}
    assert [len(part) for part in documents(list(loaded.train))] == np.diff(sorted({0, *ends})).tolist()
    assert loaded.train.column_names == ["input_ids", "labels", "position_ids"]


def test_no_packed_text_is_both_trained_and_validated_on(lm: str, tmp_path: Path) -> None:
    texts = [f"row{n} good good good good good good good" for n in range(4)]
    file = write(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    loaded = load_task("causal-lm", lm, file, packing=True, max_length=6, validation_split=0.25)
    assert loaded.val is not None
    parts = [Counter(chain(*rows["input_ids"])) for rows in (loaded.train, loaded.val)]
    beginnings = [{WORDS[token] for token in part} & {f"row{n}" for n in range(4)} for part in parts]
    assert [len(each) for each in beginnings] == [3, 1]
    assert [part[WORDS.index("good")] for part in parts] == [21, 7]
    one = write(tmp_path / "one.jsonl", [{"text": texts[0]}])
    loaded = load_task("causal-lm", lm, one, packing=True, max_length=6, validation_split=0.25)
    assert loaded.val is None, "the run holds out rows of the only text"


def test_packing_is_right_for_all_lengths() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        texts = [list(range(n)) for n in draw.integers(0, 7, draw.integers(1, 9))]
        length = int(draw.integers(1, 9))
        if not any(texts):
            continue
        packed = list(pack(Dataset.from_dict({"input_ids": texts}), "train_data", length))
        assert list(chain(*(row["input_ids"] for row in packed))) == list(chain(*texts))
        assert {len(row["input_ids"]) for row in packed[:-1]} <= {length}
        starts = {0, *np.cumsum([len(text) for text in texts]), *range(0, sum(map(len, texts)), length)}
        assert [len(part) for part in documents(packed)] == np.diff(sorted({*starts, sum(map(len, texts))})).tolist()


def test_the_gradient_of_packed_rows_is_that_of_separate_documents(lm: str, rows: str) -> None:
    loaded = load_task("causal-lm", lm, rows, packing=True, max_length=6, validation_split=0.0)
    packed, sizes = list(loaded.train), {"batch_size": 2, "effective_batch_size": 3}
    loaded.model.double()  # its buffers as well, which older Transformers multiplies by positions in float64
    with all_in_float64():
        found = accumulated_gradients(loaded.model, packed, tokenizer=loaded.tokenizer, **sizes)
        windows = windows_of(packed, **sizes)
        assert [len(window) for window in windows] == [3, len(packed) % 3]
        for gradient, window in zip(found, windows, strict=True):
            parts = documents(window)
            loaded.model.zero_grad()
            losses = [
                F.cross_entropy(loaded.model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="sum")
                for ids in map(torch.tensor, parts)
            ]
            (sum(losses) / sum(len(part) - 1 for part in parts)).backward()
            wanted = {name: p.grad for name, p in loaded.model.named_parameters()}
            assert relative_error(gradient, wanted) < 1e-12


def test_texts_without_packing_are_rows_of_their_own(lm: str, rows: str) -> None:
    loaded = load_task("causal-lm", lm, rows, validation_split=0.0)
    assert loaded.train.column_names == ["text"]
    result = test_fine_tuning(
        **loaded.arguments(), validation_split=0.0, n_epochs=1, effective_batch_size=7, progress=False
    )
    own = causal_lm()
    total: Any = sum(
        F.cross_entropy(own(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="sum")
        for ids in (torch.tensor([WORDS.index(word) for word in (*text.split(), "</s>")]) for text in REVIEWS)
    )
    assert result.loss_history == [pytest.approx(total.item() / sum(n - 1 for n in LENGTHS), rel=1e-6)]


def test_masks_do_not_depend_on_how_a_window_is_cut(bert: str, rows: str) -> None:
    gradients = []
    for batch_size in (2, 5):
        loaded = load_task("masked-lm", bert, rows, mlm_probability=0.5, validation_split=0.0)
        sizes = {"batch_size": batch_size, "effective_batch_size": 5}
        masks = Recorded(loaded.more["data_collator"])
        more = {"tokenizer": loaded.tokenizer, "data_collator": masks, "audit": False}
        gradients.append(accumulated_gradients(loaded.model, list(loaded.train), **more, **sizes))
    for found, wanted in zip(*gradients, strict=True):
        assert relative_error(found, wanted) < 1e-12
    assert [len(batch["input_ids"]) for batch in masks.batches[-2:]] == [5, 2]
    for batch, gradient in zip(masks.batches[-2:], gradients[0], strict=True):
        loaded.model.zero_grad()
        loaded.model(**batch).loss.backward()
        assert relative_error(gradient, {n: p.grad for n, p in loaded.model.named_parameters()}) < 1e-12


class Recorded:
    """A collator that keeps the batches that it makes."""

    def __init__(self, collate: Any) -> None:
        self._collate = collate
        self.batches: list[Any] = []

    def __call__(self, rows: Any) -> Any:
        batch = self._collate(rows)
        self.batches.append({name: tensor.clone() for name, tensor in batch.items()})
        return batch


def test_validation_rows_are_masked_in_the_same_way_each_time(bert: str, rows: str) -> None:
    loaded = load_task("masked-lm", bert, rows, rows, mlm_probability=0.5)
    result = test_fine_tuning(
        **loaded.arguments(), n_epochs=3, learning_rate=1e-30, effective_batch_size=7, progress=False
    )
    assert len(set(result.loss_history)) == 3
    assert [*result.val_loss_history] == [result.initial_loss] * 3
    assert all("token_accuracy" in metrics for metrics in result.metrics)


def test_the_share_of_masked_tokens_is_the_option(bert: str, rows: str) -> None:
    texts = write(Path(rows).with_name("long.jsonl"), [{"text": "good " * 30}] * 40)
    for share in (0.15, 0.6):
        loaded = load_task("masked-lm", bert, texts, mlm_probability=share)
        ids = loaded.tokenizer(list(loaded.train["text"]))["input_ids"]
        labels = loaded.more["data_collator"]([{"input_ids": row} for row in ids])["labels"]
        assert (labels != -100).double().mean() == pytest.approx(share, abs=0.05)


def test_the_command_trains_on_packed_rows(lm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = write(tmp_path / "named.jsonl", [{"review": text, "title": "a"} for text in REVIEWS])
    words = ["--task", "causal-lm", "--packing", "--max_length", "6", "--columns", "text=review", "--model", lm]
    words += ["--train_data", named, "--val_data", named, "--metric_for_best", "token_accuracy", "--audit", "False"]
    words += ["--n_epochs", "1", "--output_dir", str(tmp_path / "o"), "--progress", "no", "--keep_checkpoints", "0"]
    assert main(["train", *words]) == 0
    shown = capsys.readouterr()
    n_rows = -(-sum(LENGTHS) // 6)
    assert f"Training samples: {n_rows}\n" in shown.out
    assert "token_accuracy" in shown.out
    assert f"packed 7 texts of `train_data`, which end in '</s>', into {n_rows} rows of 6 tokens" in shown.err


@pytest.mark.parametrize("task", ["causal-lm", "masked-lm"])
def test_the_column_of_the_text_is_the_named_one_or_the_only_one(lm: str, bert: str, tmp_path: Path, task: str) -> None:
    model = {"causal-lm": lm, "masked-lm": bert}[task]
    rows = [{"text": text, "title": "a", "label": 1} for text in REVIEWS]
    file = write(tmp_path / "rows.jsonl", rows)
    options: dict[str, Any]
    for options, columns in (
        ({}, ["text"]),
        ({"columns": ["text=title"]}, ["text"]),
        ({"text_columns": ["title"]}, ["text", "title"]),
    ):
        loaded = load_task(task, model, file, **options)
        assert loaded.train.column_names == columns
        assert loaded.train[0]["text"] == ("a" if "columns" in options else REVIEWS[0])


def test_token_accuracy_compares_with_the_right_position() -> None:
    tokens, labels = np.array([[1, 2, 3, 9], [4, 5, 9, 9]]), np.array([[0, 1, 2, -100], [0, -100, 9, -100]])
    found = EvalPrediction(predictions=tokens, label_ids=labels)
    assert TokenAccuracy(next_token=True)(found) == {"token_accuracy": 2 / 3}
    assert TokenAccuracy(next_token=False)(found) == {"token_accuracy": 1 / 5}


def test_bad_input_is_refused_in_one_sentence(lm: str, bert: str, rows: str, tmp_path: Path) -> None:
    numbers = write(tmp_path / "numbers.jsonl", [{"text": "a film"}, {"text": None}])
    blank = write(tmp_path / "blank.jsonl", [{"text": " "}, {"text": ""}])
    pack = {"packing": True, "max_length": 6}
    options: dict[str, Any]
    for task, model, data, options, error, words in (
        ("causal-lm", lm, rows, {"packing": True}, SettingsError, "`packing` needs `max_length`"),
        (
            "causal-lm",
            lm,
            rows,
            pack | {"text_columns": ["text"]},
            SettingsError,
            r"`--columns text=text` \(in Python: `columns='text=text'`\)",
        ),
        ("causal-lm", lm, rows, pack | {"streaming": True}, SettingsError, "`packing` reads all texts, but"),
        ("causal-lm", lm, rows, pack | {"max_length": 99}, SettingsError, "accept at most 32 tokens"),
        ("causal-lm", lm, numbers, pack, DataError, "row 1 has None instead of text in its column 'text'"),
        ("causal-lm", lm, rows, {"columns": ["text=x"]}, DataError, "no column 'x' for the text"),
        (
            "causal-lm",
            lm,
            rows,
            {"text_column": "x"},
            SettingsError,
            "no option 'text_column'. Did you mean 'text_columns'",
        ),
        ("causal-lm", lm, rows, {"n_epochs": 1}, SettingsError, "no option 'n_epochs'. Give settings of the run to"),
        ("causal-lm", lm, blank, pack | {"add_eos_token": False}, DataError, "have no tokens"),
        ("masked-lm", bert, rows, {"tokenizer": lm}, SettingsError, "has no mask token. Choose a model such as BERT"),
        ("masked-lm", bert, rows, {"mlm_probability": 0.0}, SettingsError, "must be a number above 0, up to 1"),
    ):
        with pytest.raises(error, match=words):
            load_task(task, model, data, **options)
    with pytest.raises(SettingsError, match="names 'text', and `columns` names 'text' as text"):
        load_task("masked-lm", bert, rows, columns=["text=text"], text_columns=["text"])


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 6}], ids=["rows", "packed"])
def test_an_encoder_is_not_trained_to_predict_tokens_that_it_sees(bert: str, rows: str, options: Any) -> None:
    with pytest.raises(SettingsError, match=r"is an encoder: each token sees the next .*`--task masked-lm`"):
        load_task("causal-lm", bert, rows, **options)


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**TINY, is_decoder=True),
        XLNetConfig(vocab_size=len(WORDS), d_model=16, n_layer=1, n_head=2, d_inner=16),
        BartConfig(vocab_size=len(WORDS), d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16),
    ],
    ids=lambda config: config.model_type,
)
def test_a_decoder_of_a_type_that_also_has_encoders_is_no_encoder(config: Any) -> None:
    assert not faults_of_reading_direction(AutoModelForCausalLM.from_config(config))


def test_rows_without_text_are_counted_when_packed(lm: str, tmp_path: Path) -> None:
    texts = write(tmp_path / "rows.jsonl", [{"text": text} for text in ("a film", " ", "good", "")])
    with pytest.warns(TextWarning, match=r"2 of 4 rows \(the first is row 1\) have no text, or only spaces"):
        load_task("causal-lm", lm, texts, packing=True, max_length=6)
