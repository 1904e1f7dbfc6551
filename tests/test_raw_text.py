"""Raw text: which columns are read, how texts end, and what is reported of truncated ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset, load_dataset
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    PreTrainedTokenizerFast,
)

from ftaccum import DataError, Result, SettingsError, TextWarning, search, test_fine_tuning, verify
from ftaccum.data.text_encoder import CUT, TextEncoder
from ftaccum.tasks.arguments import TrainArguments
from ftaccum.tasks.model_source import ModelSource
from silent_errors.text_columns import LABELS, REVIEWS, TINY, WORDS, causal_lm, classifier, ids_of, word_tokenizer
from silent_errors.tokenizer_padding import llama_classifier

END = WORDS.index("</s>")
LABELLED = [{"review": text, "label": label} for text, label in zip(REVIEWS, LABELS, strict=True)]
WITH_IDS = [{"id": f"row{n}", **row, "label_text": str(row["label"])} for n, row in enumerate(LABELLED)]
LONG = " ".join(["a good film"] * 20)


def run(model: nn.Module, data: Any, **arguments: Any) -> Result:
    defaults = {"n_epochs": 1, "validation_split": 0.0, "tokenizer": word_tokenizer(), "progress": False}
    return test_fine_tuning(model, train_data=data, **(defaults | arguments))


def ending_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that adds an end token to texts."""
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", END)]
    )
    return tokenizer


def encoded(tokenizer: Any, texts: Sequence[str], limit: int | None = None, end: int | None = END) -> list[str]:
    columns = TextEncoder(tokenizer, limit, end)([list(texts)])
    assert [len(mask) for mask in columns["attention_mask"]] == [len(ids) for ids in columns["input_ids"]]
    assert all(all(mask) for mask in columns["attention_mask"])
    return [
        " ".join(WORDS[n] for n in ids) + ("…" if cut else "")
        for ids, cut in zip(columns["input_ids"], columns[CUT], strict=True)
    ]


def test_an_encoder_is_not_trained_on_the_next_tokens_of_text() -> None:
    with pytest.raises(SettingsError, match="is an encoder: each token sees the next ones"):
        run(BertLMHeadModel(BertConfig(**TINY)), [{"text": text} for text in REVIEWS])


def test_a_named_column_is_read_and_the_others_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    alone = run(classifier(), LABELLED)
    assert "Text: column 'review'; labels: 'label'\n" in capsys.readouterr().out
    renamed = [{"review": row["review"], "label_ids": row["label"]} for row in LABELLED]
    assert run(classifier(), renamed).loss_history == alone.loss_history
    assert "Text: column 'review'; labels: 'label_ids'\n" in capsys.readouterr().out
    for name in ("review", ["review"]):
        named = run(classifier(), WITH_IDS, text_columns=name)
        assert named.loss_history == alone.loss_history
        assert "Text: column 'review'; labels: 'label'; left out: 'id', 'label_text'\n" in capsys.readouterr().out


@pytest.mark.slow
def test_pairs_are_read_in_the_order_in_which_they_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "other": "the bad film row7"} for row in LABELLED]
    tokenizer = word_tokenizer()

    def tokens(first: str, second: str) -> list[dict[str, Any]]:
        return [{**tokenizer(row[first], row[second]), "labels": row["label"]} for row in rows]

    for names in (("review", "other"), ("other", "review")):
        found = run(classifier(), rows, text_columns=names)
        assert found.loss_history == run(classifier(), tokens(*names)).loss_history
    assert "Text: pairs of columns 'other', 'review'" in capsys.readouterr().out
    assert run(classifier(), rows, text_columns="other, review").loss_history == found.loss_history


def test_a_stream_is_read_by_the_same_rules() -> None:
    stream = IterableDataset.from_generator(lambda: iter(WITH_IDS))
    named = run(classifier(), stream, text_columns="review", max_updates=2)
    assert (
        named.loss_history
        == run(classifier(), IterableDataset.from_generator(lambda: iter(LABELLED)), max_updates=2).loss_history
    )
    with pytest.raises(DataError, match=r"`train_data` has 3 columns of text: 'id' .* 'review' .* 'label_text'"):
        run(classifier(), stream, max_updates=2)


@pytest.mark.slow
def test_verify_and_search_read_text_by_the_same_rules(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"tokenizer": word_tokenizer(), "progress": False}
    searched = {**arguments, "n_trials": 2, "n_epochs": 1}
    with pytest.raises(DataError, match="`data` has 3 columns of text"):
        verify(classifier(), WITH_IDS, **arguments)
    with pytest.raises(DataError, match="`train_data` has 3 columns of text"):
        search(classifier, None, WITH_IDS, WITH_IDS, **searched)
    found = verify(classifier(), WITH_IDS, text_columns="review", **arguments)
    assert "Text: column 'review'; labels: 'label'; left out: 'id', 'label_text'" in found.notes
    search(classifier, None, WITH_IDS, WITH_IDS, text_columns="review", **searched)
    assert capsys.readouterr().out.count("Text: column 'review'") == 1


def test_validation_rows_may_be_the_only_raw_text() -> None:
    tokens = [
        {"input_ids": ids_of(text)[0].tolist(), "labels": label} for text, label in zip(REVIEWS, LABELS, strict=True)
    ]
    named = run(classifier(), tokens, val_data=WITH_IDS, text_columns="review")
    assert named.val_loss_history == run(classifier(), tokens, val_data=tokens).val_loss_history
    with pytest.raises(DataError, match="`val_data` has 3 columns of text"):
        run(classifier(), tokens, val_data=WITH_IDS)


@pytest.mark.parametrize(
    ("rows", "names", "words"),
    [
        (LABELLED, "revue", "`train_data` has no column 'revue' to read texts from, only 'review', 'label'"),
        (LABELLED, "label", "`text_columns` names 'label', which is the column of the labels"),
        ([{**row, "n": 7} for row in LABELLED], "n", "Column 'n' of `train_data` holds 7 instead of text"),
        ([{**row, "words": ["a"]} for row in LABELLED], "words", r"\['a'\] instead of text. To train .*is_split_into"),
        ([{**row, "chat": [{"role": "a"}]} for row in LABELLED], "chat", "To train on it, .*apply_chat_template"),
        ([{**row, "raw": b"a"} for row in LABELLED], None, "2 columns of text: .* To train on 'raw', decode the bytes"),
        ([{"input_ids": [3, 4], **row} for row in LABELLED], "review", "`train_data` is not raw text: .* 'input_ids'"),
        (None, "review", "`train_data` is not raw text"),
        ([{"chat": [{"content": "a"}], "label": 0}], None, "one column of text: 'chat' .*apply_chat_template"),
        ([{"words": ["a", "film"], "label": 0}], None, "one column of text: 'words' .*is_split_into_words"),
        ([{"id": "a", "pair": {"de": "a", "en": "b"}, "label": 0}], None, "2 columns of text: 'id' .* 'pair'"),
        ([{**LABELLED[0], "review": None}, *LABELLED], None, "row 0 has None instead of text in its column 'review'"),
        ([*LABELLED, {"review": float("nan"), "label": 0}], None, "row 7 has None instead of text in its column"),
        (REVIEWS, None, r"its first row is a str instead. Turn each row into a dict of columns, such as \{'text'"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_read_are_named_before_training(rows: Any, names: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        run(classifier(), rows, text_columns=names)


@pytest.mark.parametrize("names", ["", [], ["a", "b", "c"], ["a", "a"], 3, [None]])
def test_text_columns_are_one_name_or_two(names: Any) -> None:
    with pytest.raises(SettingsError, match="`text_columns` must be the name of a column, such as 'review', or of two"):
        run(classifier(), LABELLED, text_columns=names)


def test_missing_values_in_columns_that_are_not_read_do_no_harm() -> None:
    """pandas represents missing values as NaN."""
    rows = [{**row, "title": float("nan") if n % 2 else "a"} for n, row in enumerate(LABELLED)]
    assert run(classifier(), rows, text_columns="review").loss_history == run(classifier(), LABELLED).loss_history


def test_a_causal_lm_trains_on_one_text() -> None:
    rows = [{"prompt": "the film", "response": text} for text in REVIEWS]
    assert run(causal_lm(), rows, text_columns="response").loss_history
    with pytest.raises(DataError, match=r"a causal LM trains on one text.*labels of -100 on the prompt"):
        run(causal_lm(), rows, text_columns=("prompt", "response"))


def test_texts_end_once() -> None:
    texts = ["a film", "", "a film </s>"]
    ended = ["a film </s>", "</s>", "a film </s>"]
    assert encoded(word_tokenizer(), texts) == ended
    assert encoded(ending_tokenizer(), texts[:2]) == ended[:2]
    assert encoded(word_tokenizer(), texts, end=None) == texts


def test_a_text_that_is_cut_does_not_end() -> None:
    texts = ["a good", "a good film", "a good film very very", "very"]
    for tokenizer in (word_tokenizer(), ending_tokenizer()):
        assert encoded(tokenizer, texts, 4)[:2] == ["a good </s>", "a good film </s>"]
        assert encoded(tokenizer, texts, 4)[2].startswith("a good film")
        assert "</s>" not in encoded(tokenizer, texts, 4)[2]
        assert encoded(tokenizer, texts, 3)[1].startswith("a good")
        assert encoded(tokenizer, texts, 3)[1].endswith("…")
        tokenizer.truncation_side = "left"
        assert encoded(tokenizer, texts, 4)[2].endswith("very very </s>…")
        assert encoded(tokenizer, texts, 4)[3] == "very </s>"
    assert encoded(word_tokenizer(), texts, 3, end=None) == ["a good", "a good film", "a good film…", "very"]


def test_a_tokenizer_keeps_the_truncation_that_it_came_with() -> None:
    tokenizer = word_tokenizer()
    TextEncoder(tokenizer, 3, None)([["a good film very very"]])
    assert tokenizer.backend_tokenizer.truncation is None
    tokenizer.backend_tokenizer.enable_truncation(7, direction="left")
    TextEncoder(tokenizer, 3, None)([["a good film very very"]])
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 7


@pytest.mark.slow
def test_the_banner_reports_how_texts_end(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": text} for text in REVIEWS]
    ended = run(causal_lm(), rows)
    assert "Text: column 'text'; rows end in '</s>'\n" in capsys.readouterr().out
    plain = run(causal_lm(), rows, add_eos_token=False)
    assert "Text: column 'text'\n" in capsys.readouterr().out
    assert plain.loss_history == run(causal_lm(), [ids_of(text)[0] for text in REVIEWS]).loss_history
    assert plain.loss_history != ended.loss_history
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    capsys.readouterr()
    assert run(causal_lm(), rows, tokenizer=tokenizer).loss_history == plain.loss_history
    assert "rows have no end-of-text token, because the tokenizer has none\n" in capsys.readouterr().out


def test_the_end_token_counts_even_if_it_is_the_padding_token() -> None:
    tokenizer = word_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    rows = [{"text": text} for text in REVIEWS]
    assert run(causal_lm(), rows, tokenizer=tokenizer).loss_history == run(causal_lm(), rows).loss_history


def test_a_loaded_model_knows_the_padding_of_its_tokenizer(tmp_path: Path) -> None:
    llama_classifier(pad_token_id=2).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    named = TrainArguments(model=str(tmp_path))
    source = ModelSource(named, AutoModelForSequenceClassification, AutoTokenizer)
    model, tokenizer = source.load()
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0


@pytest.mark.slow
def test_truncated_rows_are_counted_even_if_their_tokens_are_cached(tmp_path: Path) -> None:
    Dataset.from_list([{"text": "a film"}] * 5 + [{"text": LONG}] * 3).to_json(tmp_path / "rows.jsonl")
    for _ in range(2):
        rows = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train")
        with pytest.warns(
            TextWarning, match=r"In `train_data`, 3 of 8 rows \(the first is row 5\) are longer than 32 tokens"
        ):
            run(causal_lm(), rows)


def test_the_first_truncated_row_of_a_stream_is_named_when_it_comes() -> None:
    rows = [{"text": "a film"}] * 300 + [{"text": LONG}] * 3 + [{"text": "a film"}] * 5
    with pytest.warns(TextWarning, match=r"3 of the 20 rows from row 288 on \(the first is row 300\)") as warned:
        run(causal_lm(), IterableDataset.from_generator(lambda: iter(rows)), max_updates=10, batch_size=32)
    assert len(warned) == 1
