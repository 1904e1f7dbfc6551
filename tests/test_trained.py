"""`ftaccum eval` and `ftaccum predict`: a trained model on new rows."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2Model, pipeline

import ftaccum
from ftaccum import SettingsError, load_task
from ftaccum.apps.cli import main
from ftaccum.apps.prediction_file import write_predictions
from ftaccum.tasks.arguments import NamedArguments, TrainedArguments
from ftaccum.tasks.columns import describe_columns, named_columns
from ftaccum.tasks.task_of_model import find_task
from ftaccum.tasks.trained import load_trained
from silent_errors.text_columns import word_tokenizer
from task_files import TEXTS, save_encoder, save_rows

pytestmark = pytest.mark.filterwarnings("ignore::ftaccum.TextWarning")
ROWS = [{"review": f"{text} {word}", "stars": word} for text in TEXTS for word in ("good", "drags")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of a trained classifier."""
    folder = tmp_path_factory.mktemp("trained")
    model, rows = save_encoder(folder / "encoder"), save_rows(folder / "rows.jsonl", ROWS)
    words = ["--model", model, "--train_data", rows, "--columns", "label=stars", "--max_length", "6", "--n_epochs", "1"]
    words += ["--learning_rate", "1e-2", "--verbosity", "quiet", "--output_dir", str(folder / "run")]
    assert main(["train", *words]) == 0
    return folder / "run"


def reference(run: Path) -> torch.Tensor:
    """Return the logits of each row alone, in plain Transformers."""
    loaded = pipeline("text-classification", model=str(run / "model"), device="cpu").model
    with torch.no_grad():
        batches = [word_tokenizer()(row["review"], truncation=True, max_length=6, return_tensors="pt") for row in ROWS]
        return torch.cat([loaded(**batch).logits for batch in batches])


def test_eval_measures_every_row_once(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows, file = save_rows(tmp_path / "test.jsonl", ROWS), tmp_path / "found.json"
    assert main(["eval", str(run), "--data", rows, "--batch_size", "3", "--json", str(file)]) == 0
    found: dict[str, Any] = json.loads(file.read_text())
    logits, labels = reference(run), torch.tensor([["drags", "good"].index(row["stars"]) for row in ROWS])
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["metrics"]["accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    assert found["n_rows"] == len(ROWS)
    assert f"rows  {len(ROWS)}\nloss  " in capsys.readouterr().out


def test_the_settings_of_a_run_on_which_its_validation_loss_depends_are_those_of_its_evaluation(
    run: Path, tmp_path: Path
) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"effective_batch_size": 5}))
    given = TrainedArguments(data=save_rows(tmp_path / "test.jsonl", ROWS))
    read = dict.fromkeys(("text_columns", "max_length", "add_eos_token"))
    settings = load_trained(str(run), given, read, needs_targets=True).settings
    (run / "run.json").write_text(json.dumps(record))
    assert (settings["effective_batch_size"], settings["router_balance"]) == (5, "window")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_predict_writes_the_rows_in_order_with_their_classes(run: Path, tmp_path: Path, suffix: str) -> None:
    rows = save_rows(tmp_path / "new.jsonl", [{"id": n, "review": row["review"]} for n, row in enumerate(ROWS)])
    file = tmp_path / f"predictions{suffix}"
    assert main(["predict", str(run), "--data", rows, "--output", str(file), "--batch_size", "3"]) == 0
    read = {".jsonl": lambda path: pd.read_json(path, lines=True), ".csv": pd.read_csv, ".parquet": pd.read_parquet}
    table = read[suffix](file)
    scores, classes = reference(run).softmax(-1).max(-1)
    assert list(table.columns) == ["id", "review", "prediction", "score"]
    assert list(table["id"]) == list(range(len(ROWS)))
    assert list(table["prediction"]) == [["drags", "good"][n] for n in classes]
    assert list(table["score"]) == pytest.approx(scores.tolist(), rel=1e-5)


def test_the_head_of_a_model_tells_its_task(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = save_rows(tmp_path / "new.jsonl", ROWS)
    words = ["predict", str(run / "model"), "--data", rows, "--output", str(tmp_path / "out.csv")]
    assert main([*words, "--text_columns", "review"]) == 0
    assert "The head of the model is one for text-classification." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "task"),
    [
        ("config.json", {"architectures": ["BertForTokenClassification"]}, "token-classification"),
        ("config.json", {"architectures": ["RobertaForMaskedLM"]}, "masked-lm"),
        ("config.json", {"architectures": ["T5ForConditionalGeneration"]}, "seq2seq"),
        ("config.json", {"architectures": ["MyModel", "ViTForImageClassification"]}, "image-classification"),
        ("adapter_config.json", {"task_type": "SEQ_CLS"}, "text-classification"),
    ],
)
def test_a_config_tells_the_task(file: str, content: dict[str, Any], task: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    assert find_task("it", str(tmp_path)) == task


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "'it' does not say what task its model was trained for: it has the head of chat and causal-lm. Give "
            "`--task`, one of chat, causal-lm.",
        ),
        ({"architectures": ["GPT2Model"]}, "trained for. Give `--task`, one of text-classification, token-"),
        ({"architectures": None}, "trained for. Give `--task`, one of text-classification, token-"),
        ([], "trained for. Give `--task`, one of text-classification, token-"),
    ],
)
def test_a_config_that_does_not_tell_the_task_is_an_error(content: Any, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(SettingsError, match=re.escape(sentence)):
        find_task("it", str(tmp_path))


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["whole model", "adapters"])
def test_a_run_from_python_records_how_load_task_read_its_rows(lora: Any, tmp_path: Path) -> None:
    rows = save_rows(tmp_path / "rows.jsonl", ROWS)
    loaded = load_task(
        "text-classification", save_encoder(tmp_path / "encoder"), rows, columns=["label=stars"], lora=lora
    )
    folder = tmp_path / "run"
    result = ftaccum.test_fine_tuning(**loaded.arguments(), lora=lora, max_updates=1, output_dir=str(folder))
    read = dict.fromkeys(("text_columns", "max_length", "add_eos_token"))
    found = load_trained(str(folder), TrainedArguments(data=rows), read, needs_targets=True)
    assert (found.task.named.task, found.task.named.columns) == ("text-classification", ["label=stars"])
    wanted = dict(result.model.named_parameters())
    for name, weight in found.model.named_parameters():
        assert "original_module" in name or torch.equal(weight, wanted[name]), name


def test_texts_are_read_from_the_column_that_the_run_has_read(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"title": "a title", **row} for row in ROWS]
    words = ["predict", str(run), "--output", str(tmp_path / "out.csv"), "--data"]
    assert main([*words, save_rows(tmp_path / "more.jsonl", rows)]) == 0
    assert "Columns: 'review' as text; left out: 'title', 'stars'" in capsys.readouterr().err
    table, scores = pd.read_csv(tmp_path / "out.csv"), reference(run).softmax(-1).max(-1)[0]
    assert list(table["score"]) == pytest.approx(scores.tolist(), rel=1e-5)
    assert main([*words, save_rows(tmp_path / "other.jsonl", [{"text": row["review"]} for row in ROWS])]) == 2
    assert "`data` has no column 'review' to read texts from, only 'text'" in capsys.readouterr().err


def test_numbers_that_are_names_of_classes_must_all_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row | {"stars": str(n % 3 + 1)} for n, row in enumerate(ROWS)]
    words = ["--model", save_encoder(tmp_path / "encoder"), "--train_data", save_rows(tmp_path / "rows.jsonl", rows)]
    words += ["--columns", "label=stars", "--max_updates", "1", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *words]) == 0
    numbers = [row | {"stars": int(row["stars"])} for row in rows]
    losses = []
    for name, some in (("names", rows), ("numbers", numbers)):
        data, file = save_rows(tmp_path / f"{name}.jsonl", some), tmp_path / f"{name}.json"
        assert main(["eval", str(tmp_path / "run"), "--data", data, "--json", str(file)]) == 0
        losses.append(json.loads(file.read_text())["loss"])
    assert losses[0] == losses[1]
    data = save_rows(tmp_path / "unknown.jsonl", [*numbers, numbers[0] | {"stars": 0}])
    assert main(["eval", str(tmp_path / "run"), "--data", data]) == 2
    assert f"row {len(numbers)} has the label '0', which is none of the classes" in capsys.readouterr().err


def test_several_numbers_are_predicted_as_lists(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=24, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3,
        problem_type="regression",
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    data, output = (
        save_rows(tmp_path / "rows.jsonl", [{"review": row["review"]} for row in ROWS]),
        tmp_path / "out.jsonl",
    )
    assert main(["predict", str(tmp_path / "model"), "--data", data, "--output", str(output)]) == 0
    assert [len(prediction) for prediction in pd.read_json(output, lines=True)["prediction"]] == [3] * len(ROWS)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["eval"], "RUN is required: the output folder of a run, as in `ftaccum eval RUN --data test.csv`."),
        (["eval", "no/such/folder", "--data", "x.csv"], "'no/such/folder': there is no folder 'no/such'."),
        (["eval", "{run}x", "--data", "x.csv"], "there is no such folder. Did you mean '{run}'?"),
        (["eval", "nothere", "--data", "x.csv"], "and the hub cannot be reached or has no such model. Check the name."),
        (["eval", "{run}"], "`--data` is required."),
        (["predict", "{run}", "--data", "x.csv"], "`--output` is required."),
        (["predict", "{run}", "--data", "x.csv", "--output", "x.txt"], "`--output` must end in .jsonl, .csv, .parquet"),
        (["eval", "{run}", "--data", "x.csv", "--batch_size", "auto"], "`batch_size` must be a positive integer"),
        (["eval", "{run}", "--data", "x.csv", "--max_tokens", "auto"], "`max_tokens` must be a positive integer"),
        (["eval", "{run}", "--data", "x.csv", "--json", "no/folder/found.json"], "in a folder that does not exist"),
        (["eval", "{run}", "--data", "x.csv", "--json", "{rows}"], "is a folder. Give the name of a file."),
        (["eval", "{rows}", "--data", "x.csv"], "has no trained model"),
        (
            ["predict", "{run}/model", "--data", "x.csv", "--output", "x.csv", "--task", "masked-lm"],
            "`ftaccum predict` has no predictions for the task 'masked-lm'.",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    run: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(run=run, rows=run.parent) for word in words]) == 2
    assert sentence.format(run=run) in capsys.readouterr().err


def test_eval_of_an_interrupted_run_says_how_to_finish_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((run / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"finished": False}))
    for has_checkpoint in (False, True):
        if has_checkpoint:
            (tmp_path / "checkpoints" / "update-00000001").mkdir(parents=True)
        assert main(["eval", str(tmp_path), "--data", "x.csv"]) == 2
        assert ("or finish this one with `--resume auto`." in capsys.readouterr().err) == has_checkpoint


def test_a_sentence_on_columns_has_no_empty_list() -> None:
    assert describe_columns({}, ["text", "label"]) == "Columns: left out: 'text', 'label'"
    assert describe_columns({"text": "a"}, ["a"]) == "Columns: 'a' as text"
    assert describe_columns({}, []) == "Columns: none"


def test_columns_of_a_task_without_roles_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"names the role 'label', but .* are: none\. Leave it out"):
        named_columns(NamedArguments(task="plain", columns=("label=stars",)), {})


def test_written_rows_keep_every_digit_and_lists_become_json(tmp_path: Path) -> None:
    rows = [{"id": 2**60 + 1, "x": 1 / 7, "tags": ["a", "ü"]}, {"id": None, "x": 1e-15, "tags": []}]
    scores = [[1e-12, 1 / 3], [0.5, float("nan")]]
    for suffix in (".jsonl", ".csv"):
        write_predictions(str(tmp_path / f"out{suffix}"), Dataset.from_list(rows), {"scores": scores})
    wanted = [row | {"scores": each} for row, each in zip(rows, [scores[0], [0.5, None]], strict=True)]
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == wanted
    with (tmp_path / "out.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {"id": str(2**60 + 1), "x": repr(1 / 7), "tags": '["a", "ü"]', "scores": json.dumps(scores[0])}
    assert second == {"id": "", "x": "1e-15", "tags": "[]", "scores": "[0.5, null]"}


def test_a_run_of_adapters_is_evaluated_with_the_padding_that_it_was_trained_with(tmp_path: Path) -> None:
    sizes = {"vocab_size": 24, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32}
    torch.manual_seed(0)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    GPT2Model(GPT2Config(**sizes, **off, pad_token_id=3)).save_pretrained(tmp_path / "gpt")  # the tokenizer's is 0
    word_tokenizer().save_pretrained(tmp_path / "gpt")
    rows, run = save_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "run"
    words = ["--model", str(tmp_path / "gpt"), "--train_data", rows, "--val_data", rows, "--label_column", "stars"]
    words += ["--text_columns", "review", "--lora", "--n_epochs", "1", "--learning_rate", "1e-2", "--batch_size", "4"]
    assert main(["train", *words, "--verbosity", "quiet", "--output_dir", str(run)]) == 0
    assert main(["eval", str(run), "--data", rows, "--batch_size", "4", "--json", str(tmp_path / "found.json")]) == 0
    trained = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    losses = [entry["val_loss"] for entry in trained if entry.get("val_loss") is not None]
    assert json.loads((tmp_path / "found.json").read_text())["loss"] == pytest.approx(losses[-1], rel=1e-5)
