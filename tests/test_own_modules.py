"""The public parts of scripts that train a module of their own: options, tokens of several texts, and a wrapper."""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import ftaccum
from ftaccum import ModelAndDataOptions, ModelWrapper, ScriptOptions, SettingsError, tokenize_columns
from task_files import save_encoder

TEXTS = {"question": ["a good film", "film"], "answer": ["the very bad film", "not bad"], "grade": [3, 4]}


class Twice(ModelWrapper):
    """Runs a classifier twice."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Any]:
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return {"loss": self.model(**batch).loss + self.model(**batch).loss}


@dataclass
class Options(ModelAndDataOptions):
    other: str = field(default="answer", metadata={"help": "another column"})


@pytest.fixture
def model(tmp_path: Path) -> str:
    return save_encoder(tmp_path / "encoder")


def options(*words: str, **defaults: Any) -> ScriptOptions:
    found = []
    with pytest.raises(SystemExit) as done:
        ftaccum.run_script(found.append, extra=Options, arguments=words, **defaults)
    assert done.value.code == 0
    return found[0]


def test_columns_of_texts_become_tokens_with_their_prefix(model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = tokenize_columns(Dataset.from_dict(TEXTS), tokenizer, {"one": "question", "two": "answer"})
    assert rows["grade"] == [3, 4]
    assert not {"question", "answer"} & set(rows.column_names)
    for prefix, column in (("one", "question"), ("two", "answer")):
        for name, values in tokenizer(TEXTS[column]).items():
            assert rows[f"{prefix}_{name}"][:] == values


def test_long_texts_are_cut_and_the_tokenizer_stays_as_it_is(model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = tokenize_columns(Dataset.from_dict(TEXTS), tokenizer, {"one": "answer"}, max_length=2)
    assert list(map(len, rows["one_input_ids"])) == [2, 2]
    assert tokenizer.backend_tokenizer.truncation is None
    encoder = AutoModel.from_pretrained(model)
    with pytest.raises(SettingsError, match="`max_length` is 999, but the tokenizer and the model accept at most"):
        tokenize_columns(Dataset.from_dict(TEXTS), tokenizer, {"one": "answer"}, model=encoder, max_length=999)


def test_a_script_reads_the_texts_that_its_options_name(model: str, tmp_path: Path) -> None:
    for name in ("train", "val"):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([list(TEXTS), *zip(*TEXTS.values(), strict=True)])
    train, val = (str(tmp_path / f"{name}.csv") for name in ("train", "val"))
    words = ("--max_val_rows", "1", "--other", "grade", "--lora_targets", "query,value")
    extra = options(*words, model=model, train_data=train, val_data=val).extra
    rows = extra.read(("question", extra.other))
    assert {name: len(each) for name, each in rows.items()} == {"train_data": 2, "val_data": 1}
    assert rows["train_data"]["grade"] == ["3", "4"], "a column of texts, although all are numbers"
    assert extra.lora_argument() == {"target_modules": ["query", "value"]}
    assert extra.load(AutoModel)[0].config.model_type == "bert"


def test_the_default_val_data_belong_to_the_default_train_data() -> None:
    defaults = {"model": "m", "train_data": "train.csv", "val_data": "val.csv"}
    assert options(**defaults).extra.val_data == "val.csv"
    assert options("--train_data", "other.csv", **defaults).extra.val_data is None
    assert options("--train_data", "other.csv", "--val_data", "my.csv", **defaults).extra.val_data == "my.csv"


def test_a_wrapper_trains_with_checkpointing_and_saves_the_model_inside(model: str, tmp_path: Path) -> None:
    wrapped = Twice(AutoModelForSequenceClassification.from_pretrained(model))
    rows = [{"input_ids": [1, 2, 3][:n], "labels": n % 2} for n in (1, 2, 3, 2)]
    result = ftaccum.test_fine_tuning(
        wrapped, train_data=rows, max_updates=2, gradient_checkpointing=True, validation_split=0.0, progress=False,
        verbosity="quiet", output_dir=tmp_path / "out",
    )  # fmt: skip
    for folder in (tmp_path / "out" / "model", tmp_path / "again"):
        if not folder.exists():
            result.save_model(folder)
        loaded = AutoModelForSequenceClassification.from_pretrained(folder)
        for name, weight in wrapped.model.state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[name], weight, rtol=0, atol=0)
        assert "AutoModelForSequenceClassification" in (folder / "README.md").read_text()


def test_a_wrapper_gets_adapters_in_the_model_inside(model: str, tmp_path: Path) -> None:
    inner = AutoModelForSequenceClassification.from_pretrained(model)
    inner.config.name_or_path = model
    wrapped = Twice(inner)
    rows = [{"input_ids": [1, 2, 3][:n], "labels": n % 2} for n in (1, 2, 3, 2)]
    result = ftaccum.test_fine_tuning(
        wrapped, train_data=rows, max_updates=2, lora={"r": 2}, validation_split=0.0, progress=False, save="merged",
        verbosity="quiet", output_dir=tmp_path / "out", learning_rate=0.1,
    )  # fmt: skip
    assert result.model is wrapped
    assert isinstance(wrapped.model, PeftModel)
    assert {name.partition(".")[0] for name, p in wrapped.named_parameters() if p.requires_grad} == {"model"}
    batch = {"input_ids": torch.tensor([[1, 2, 3]])}
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model").eval()
    torch.testing.assert_close(merged(**batch).logits, wrapped.eval().model(**batch).logits)


def test_a_script_may_choose_the_type_of_weights_and_the_delimiter(model: str, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("question|answer\na, film|good\n")
    words = ("--dtype", "bfloat16", "--delimiter", "|", "--model", model, "--train_data", str(tmp_path / "train.csv"))
    extra = options(*words).extra
    assert extra.read(("question", "answer"))["train_data"][0] == {"question": "a, film", "answer": "good"}
    assert extra.load(AutoModel)[0].dtype == torch.bfloat16
    with pytest.raises(SettingsError, match="`load_in_4bit` is True, but weights of so few bits cannot be trained"):
        options(*words, "--load_in_4bit").extra.load(AutoModel)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--max_val_rows", "3"], "`max_val_rows` is 3, but `val_data` is None"),
        (["--early_stopping_patience", "2", "--validation_split", "0"], "`early_stopping_patience` needs validation"),
    ],
)
def test_options_that_need_validation_data_are_refused_before_the_script_starts(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        ftaccum.run_script(pytest.fail, extra=Options, model="m", train_data="x.csv", arguments=words)
    assert done.value.code == 2
    assert expected in capsys.readouterr().err


def test_a_limit_on_validation_rows_needs_validation_data() -> None:
    with pytest.raises(SettingsError, match="`max_val_rows` is 3, but `val_data` is None"):
        Options(model="m", train_data="x.csv", max_val_rows=3).read(("question",))
