"""The task seq2seq: texts from texts, with metrics of generated texts."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import processors
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

from chats import save_chat_model
from ftaccum import DataError, SettingsError, TextWarning, load_task, test_fine_tuning
from ftaccum.apps.cli import main
from ftaccum.arguments import parse_settings
from ftaccum.tasks.arguments import TrainArguments
from ftaccum.tasks.load import loading, make_task
from ftaccum.tasks.task import EncodingOptions
from ftaccum.tasks.text_metrics import decoded, text_metrics
from silent_errors.text_columns import REVIEWS, WORDS, word_tokenizer
from task_files import save_rows, task_errors

END, START = WORDS.index("</s>"), 0
ROWS = [
    {"article": text, "summary": " ".join(text.split()[:n])}
    for text, n in zip(REVIEWS, (2, 1, 4, 1, 1, 2, 3), strict=True)
]
QUIET: dict[str, Any] = {"progress": False, "verbosity": "quiet", "n_epochs": 1}


def end_tokenizer() -> Any:
    """Return a tokenizer of words that ends each text with its end token."""
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", END)]
    )
    return tokenizer


def save_model(folder: Path, tokenizer: Any) -> str:
    config = BartConfig(
        vocab_size=len(WORDS), d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=32, dropout=0.0,
        init_std=1.5, pad_token_id=0, bos_token_id=START, eos_token_id=END, decoder_start_token_id=START,
        forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    BartForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("bart"), end_tokenizer())


@pytest.fixture
def file(tmp_path: Path) -> str:
    return save_rows(tmp_path / "rows.jsonl", ROWS)


def ids_of(text: str) -> list[int]:
    return [*(WORDS.index(word) for word in text.split()), END]


def test_it_trains_exactly_on_targets_with_their_end_token(model: str, file: str) -> None:
    def loss(model: nn.Module, window: list[dict[str, Any]]) -> Tensor:
        losses = []
        for row in window:
            ids, labels = (torch.tensor([ids_of(text)]) for text in (f"the good {row['article']}", row["summary"]))
            given = torch.cat([torch.tensor([[START]]), labels[:, :-1]], 1)
            logits = model(input_ids=ids, decoder_input_ids=given).logits[0]
            losses.append(nn.functional.cross_entropy(logits, labels[0], reduction="none"))
        return torch.cat(losses).mean()

    errors = task_errors("seq2seq", model, file, ROWS, loss, source_prefix="the good ")
    assert len(errors) == 2
    assert max(errors) < 1e-12


def test_an_evaluation_compares_the_generated_texts(model: str, file: str) -> None:
    loaded = load_task("seq2seq", model, file, file, max_target_length=5)
    assert loaded.more["generation_kwargs"] == {"max_new_tokens": 5}
    tokenizer, rows, got = end_tokenizer(), [], []
    compute = loaded.more.pop("compute_metrics")
    found = test_fine_tuning(
        **loaded.arguments(),
        **QUIET,
        audit=False,
        max_updates=1,
        compute_metrics=lambda given: got.append(given) or compute(given),
        learning_rate=1e-9,
    )
    for row in ROWS:
        out = loaded.model.eval().generate(input_ids=torch.tensor([ids_of(row["article"])]), max_new_tokens=5)
        rows.append(tokenizer.decode(out[0], skip_special_tokens=True))
    assert len(set(rows)) > 1
    assert found.metrics[-1] == text_metrics(rows, [row["summary"] for row in ROWS])
    task = make_task(TrainArguments(task="seq2seq"))
    columns = task.predicted_columns(got[-1].predictions, loaded.val, loaded.tokenizer, loaded.model)
    assert columns == {"prediction": rows}


def test_metrics_have_known_values() -> None:
    """Those of rouge-score and sacrebleu are checked on cases that can be counted by hand."""
    handlers = logging.root.handlers[:]
    found = text_metrics(["the cat sat on a mat", "red"], ["the cat sat on the mat", "blue"])
    assert found["exact_match"] == 0.0
    assert found["rouge1"] == pytest.approx((5 / 6 + 0) / 2)
    assert found["rouge2"] == pytest.approx((3 / 5 + 0) / 2)
    assert found["rougeL"] == pytest.approx((5 / 6 + 0) / 2)
    assert logging.root.handlers == handlers  # a new one would print the messages of a run twice
    # Shares of 1- to 4-grams that match: 5 of 7, 3 of 5, 2 of 4, 1 of 3. Lengths are equal.
    assert found["bleu"] == pytest.approx(100 * (5 / 7 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    same = text_metrics(["good film"] * 2, ["good film"] * 2)
    assert same["chrf"] == same["exact_match"] * 100 == 100.0
    # chrF of "ab" and "ac": of single letters, 1 of 2 match; of pairs, 0 of 1.
    assert text_metrics(["ab"], ["ac"])["chrf"] == pytest.approx((50 + 0) / 2)


def test_without_their_packages_only_exact_match_is_computed(
    model: str, file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ftaccum.tasks.text_metrics.find_spec", lambda _: None)
    assert text_metrics(["a", "b"], ["a", "c"]) == {"exact_match": 0.5}
    task = make_task(TrainArguments(task="seq2seq"))
    assert task.metrics == ("exact_match",)
    with pytest.raises(
        SettingsError, match=r"`metric_for_best` is 'rougeL', but .* Install it: `pip install rouge-score`"
    ):
        task.check(parse_settings({"metric_for_best": "eval_rougeL"})[0])
    task.check(parse_settings({"metric_for_best": "exact_match"})[0])
    with loading(verbosity="normal", progress=False):
        load_task("seq2seq", model, file, file)
    printed = capsys.readouterr()
    sentence = "Not computed: rouge1, rouge2, rougeL, chrf, bleu. `pip install rouge-score` and `pip install sacrebleu`"
    assert printed.err.count(sentence) == 1


def test_sources_and_targets_are_truncated_and_counted(model: str, tmp_path: Path) -> None:
    rows = [{"source": "a film", "target": "good"}, {"source": "a very good film", "target": "a very good film"}]
    file = save_rows(tmp_path / "rows.jsonl", [*rows, {"source": " ", "target": ""}])
    with pytest.warns(TextWarning) as caught:
        loaded = load_task("seq2seq", model, file, max_length=3, max_target_length=4)
    assert [str(each.message).split(" or the")[0].split(", the limit")[0] for each in caught] == [
        "In `train_data`, 1 of 3 rows (the first is row 1) have sources of more than 3 tokens",
        "In `train_data`, 1 of 3 rows (the first is row 1) have targets of more than 4 tokens",
        "In `train_data`, 1 of 3 rows (the first is row 2) have no text as their source,".removesuffix(",")
        + ", or only spaces. Drop them if the model should not train on them.",
        "In `train_data`, 1 of 3 rows (the first is row 2) have no text as their target,".removesuffix(",")
        + ", or only spaces. Drop them if the model should not train on them.",
    ]
    assert loaded.train["input_ids"][:] == [ids_of("a film"), [*ids_of("a very")[:2], END], [END]]
    assert loaded.train["labels"][:] == [ids_of("good"), ids_of("a very good"), [END]]
    assert set(loaded.train.column_names) <= {"input_ids", "attention_mask", "token_type_ids", "labels"}


def test_targets_without_an_end_token_are_reported(file: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", word_tokenizer())
    with pytest.warns(TextWarning, match="adds no end token to targets, so the model does not learn to stop"):
        load_task("seq2seq", folder, file)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"article": None, "summary": "good"}, "row 1 has None instead of a text as its source. Fix or drop the row."),
        ({"article": "good", "summary": None}, "row 1 has None instead of a text as its target. Fix or drop the row."),
    ],
)
def test_rows_without_texts_are_refused_before_the_model_is_loaded(
    row: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    file = save_rows(tmp_path / "rows.jsonl", [ROWS[0], row])
    with pytest.raises(DataError, match=f"In `train_data`, {sentence}"):
        load_task("seq2seq", "no/such/model", file)


def test_columns_of_dicts_are_refused_with_a_remedy(tmp_path: Path) -> None:
    file = save_rows(tmp_path / "rows.jsonl", [{"text": "a", "translation": {"en": "a", "de": "ein"}}])
    with pytest.raises(DataError, match=r"instead of a text as its target. Make a column of each of its texts"):
        load_task("seq2seq", "no/such/model", file)


def test_options_are_refused_where_they_do_not_fit(model: str, file: str) -> None:
    with pytest.raises(SettingsError, match="`max_target_length` is 33, but the model has only 32 positions"):
        load_task("seq2seq", model, file, max_target_length=33)
    with pytest.raises(
        SettingsError, match="`source_prefix` is an option of the task 'seq2seq', but `task` is 'causal-lm'"
    ):
        load_task("causal-lm", model, file, source_prefix="summarize: ")


def test_a_model_of_another_class_is_refused_with_the_tasks_that_fit(file: str, tmp_path: Path) -> None:
    llama = save_chat_model(tmp_path / "llama")
    fits = "text-classification, token-classification, question-answering, chat, causal-lm."
    sentence = (
        f"is of type 'llama', for which .* no AutoModelForSeq2SeqLM, .* task 'seq2seq' .* of this type are {fits}"
    )
    with pytest.raises(SettingsError, match=sentence):
        load_task("seq2seq", llama, file)


def test_rows_without_targets_are_encoded_to_predict(model: str, file: str) -> None:
    loaded = load_task("seq2seq", model, file)
    rows = Dataset.from_dict({"source": [row["article"] for row in ROWS]})
    encoded = loaded.task.encode(rows, "data", loaded.tokenizer, loaded.model, EncodingOptions())
    assert encoded["input_ids"][:] == [ids_of(row["article"]) for row in ROWS]
    assert "labels" not in encoded.column_names


def test_predict_writes_the_texts_of_rows_without_targets(model: str, tmp_path: Path) -> None:
    rows = [{"id": n, "article": row["article"], "target": None} for n, row in enumerate(ROWS)]
    file = tmp_path / "predictions.jsonl"
    words = ["--task", "seq2seq", "--data", save_rows(tmp_path / "new.jsonl", rows), "--output", str(file)]
    assert main(["predict", model, *words, "--batch_size", "3", "--verbosity", "quiet"]) == 0
    loaded = BartForConditionalGeneration.from_pretrained(model).eval()
    wanted = []
    for row in rows:
        out = loaded.generate(input_ids=torch.tensor([ids_of(row["article"])]), max_new_tokens=32)
        wanted.append({**row, "prediction": end_tokenizer().decode(out[0], skip_special_tokens=True)})
    assert [json.loads(line) for line in file.read_text().splitlines()] == wanted


def test_padding_is_left_out_of_decoded_texts() -> None:
    ids = np.array([[0, 3, 5, 2, -100], [5, -100, -100, -100, -100]])
    assert decoded(ids, end_tokenizer()) == ["a good", "good"]
    without_padding = end_tokenizer()
    without_padding.pad_token = None
    assert decoded(ids[:, 1:], without_padding) == ["a good", ""]
