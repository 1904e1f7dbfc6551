"""The model card in the folder of a saved model: true, without names of this machine, and its code runs."""

import math
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from datasets import Dataset, load_dataset
from huggingface_hub import ModelCard
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    TrainerCallback,
)
from transformers.models.auto import modeling_auto

import ftaccum
from ftaccum import InexactLossError, Result, test_fine_tuning
from ftaccum.apps.cli import main
from ftaccum.callbacks import ExponentialMovingAverage
from ftaccum.insight.model_card import is_unchanged_card
from ftaccum.insight.page import page
from ftaccum.insight.run_metadata import Named, RunMetadata, named_model, public_name
from ftaccum.runtime.log import run_logging
from ftaccum.tracking.auto_classes import AUTO_CLASSES
from ftaccum.training.card_metadata import gather_metadata
from ftaccum.training.named_sources import name_of_dataset
from heads import HEADS

CLASSIFIER = HEADS["sequence classification, BERT"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
TEXTS: dict[str, Any] = {
    "text": ["good film", "bad", "good", "a bad film", "film", "bad bad film"],
    "label": [1, 0, 1, 0, 2, 0],
}


def run(folder: Path | None, model: Any = None, **arguments: Any) -> Result:
    given: dict[str, Any] = {"train_data": CLASSIFIER.rows(9), "batch_size": 2, "effective_batch_size": 4}
    given |= {"n_epochs": 1, "validation_split": 0.0, "verbosity": "quiet", "checkpoint_every": None}
    model = CLASSIFIER.model().float() if model is None else model
    return test_fine_tuning(model, output_dir=None if folder is None else str(folder), **given | arguments)


def card(folder: Path) -> Any:
    return ModelCard.load(folder / "README.md")


def code(folder: Path) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", card(folder).text, re.DOTALL)
    return block


def table(folder: Path) -> dict[str, str]:
    """Return the last column of the tables of a card by the first."""
    rows = [line.strip("| ").split(" | ") for line in card(folder).text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[-1] for cells in rows}


def write_base(folder: Path, **config: Any) -> None:
    """Write a tiny classifier with a tokenizer."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=len(WORDS), **sizes, **config)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)


def text_run(base: Path, folder: Path | None, name: str | None = None, **arguments: Any) -> Result:
    """Train the classifier in a folder, as if it had been loaded under another name."""
    labels = {0: "bad", 1: "good", 2: "other"}
    model = AutoModelForSequenceClassification.from_pretrained(base, id2label=labels, ignore_mismatched_sizes=True)
    if name is not None:
        model.name_or_path = name
    tokenizer = BertTokenizerFast.from_pretrained(base)
    return run(folder, model, train_data=Dataset.from_dict(TEXTS), tokenizer=tokenizer, audit=False, **arguments)


def test_the_metadata_are_those_of_the_run(tmp_path: Path) -> None:
    model: Any = CLASSIFIER.model().float()
    model.name_or_path = "anna/base"
    rows = Dataset.from_list(CLASSIFIER.rows(12))
    rows.info.download_checksums = {"hf://datasets/anna/reviews@0123/data.parquet": None}
    result = run(
        tmp_path / "reviews", model, train_data=rows, validation_split=0.25, compute_metrics=ftaccum.Accuracy(),
        n_epochs=2,
    )  # fmt: skip
    data = card(tmp_path / "reviews" / "model").data
    assert (data.base_model, data.library_name, data.pipeline_tag) == (
        "anna/base",
        "transformers",
        "text-classification",
    )
    assert (data.tags, data.datasets, data.metrics) == (["ftaccum"], ["anna/reviews"], ["accuracy"])
    assert data.model_name == "reviews"
    before = f"| before training | 0 | {result.initial_loss:.4f} | {result.initial_metrics['accuracy']:.4f} |"
    assert before in card(tmp_path / "reviews" / "model").text
    found = {each.metric_type: each.metric_value for each in data.eval_results}
    assert found == {"loss": result.final_loss, **result.metrics[-1]}
    assert {(each.task_type, each.dataset_type) for each in data.eval_results} == {
        ("text-classification", "anna/reviews")
    }


def test_the_text_has_the_figures_of_the_run(tmp_path: Path) -> None:
    result = run(tmp_path, batch_size=3, effective_batch_size=6, learning_rate=3e-4, gradient_clip_norm=None)
    found, text = table(tmp_path / "model"), card(tmp_path / "model").text
    assert (found["Training"], found["Batch size"], found["Gradient accumulation steps"]) == ("9", "3", "2")
    assert (found["Effective batch size"], found["Updates"], found["Gradient clipping"]) == ("6", "2", "none")
    assert (found["Optimizer"], found["Peak learning rate"]) == ("AdamW, betas 0.9 and 0.999", "0.0003")
    assert found["Weight decay"] == "0.01, 0 for biases and norms"
    assert found["Micro-batches"].startswith("at most 3 rows; each update is split ")
    assert f"torch {version('torch')}" in found["Versions"]
    worst = max(audit["error"] for audit in result.audits)
    assert f"The worst relative error was {worst:.1e}; the tolerance for rounding was" in text
    loss = f"Training loss of the last epoch: {result.train_loss_history[-1]:.4f}."
    assert f"{loss} There was no validation." in text


def test_a_known_noise_scale_is_on_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows, shown in ((400.0, "at least 400 rows"), (math.nan, None)):

        def measured(*given: Any, rows: float = rows, **more: Any) -> RunMetadata:
            metadata = gather_metadata(*given, **more)
            assert metadata is not None
            found = {"signal_share_lower": 0 * rows, "noise_rows_lower": rows}
            found |= {"noise_rows": math.nan, "noise_rows_upper": math.inf}
            return replace(metadata, result={**metadata.result, "noise_scale": found})

        monkeypatch.setattr("ftaccum.training.run.gather_metadata", measured)
        run(tmp_path, max_updates=1, audit=False)
        assert table(tmp_path / "model").get("Gradient noise scale") == shown


def test_the_results_on_the_card_are_those_of_the_saved_weights(tmp_path: Path) -> None:
    result = run(
        tmp_path, val_data=CLASSIFIER.rows(5), n_epochs=3, learning_rate=0.3, restore_best_weights=True, audit=False
    )
    assert result.restored_update is not None
    best = result.val_loss_history[result.evaluation_updates.index(result.restored_update)]
    assert best < result.final_loss
    assert f"last epoch: {result.train_loss_history[-1]:.4f}.\n" in card(tmp_path / "model").text
    (measured,) = card(tmp_path / "model").data.eval_results
    assert measured.metric_value == best
    assert (
        f"best evaluation by validation loss, after update {result.restored_update}." in card(tmp_path / "model").text
    )


@pytest.mark.parametrize(
    "average", [ExponentialMovingAverage(0.5, evaluates=False), ExponentialMovingAverage(0.5, saves=False)]
)
def test_the_card_shows_no_results_of_other_weights_than_those_saved(
    average: ExponentialMovingAverage, tmp_path: Path
) -> None:
    run(tmp_path, val_data=CLASSIFIER.rows(5), max_updates=2, learning_rate=0.3, audit=False, callbacks=[average])
    assert not card(tmp_path / "model").data.eval_results
    assert "The saved weights are not those of an evaluation" in card(tmp_path / "model").text


def test_the_code_loads_a_model_with_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    text_run(tmp_path / "base", tmp_path / "run").save_model("again")
    assert "Labels: 0 `bad`, 1 `good`, 2 `other`." in card(tmp_path / "run" / "model").text
    for folder in (tmp_path / "run" / "model", tmp_path / "again"):
        monkeypatch.chdir(folder.parent)
        names: dict[str, Any] = {}
        exec(code(folder), names)
        assert names["pipe"]("good film")[0]["label"] in ("bad", "good", "other")


def test_the_code_loads_a_model_without_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(tmp_path, audit=False)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code(tmp_path / "model"), names)
    assert type(names["model"]) is type(result.model)


def test_the_code_loads_the_weights_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(torch.ones(3), n % 2) for n in range(8)]
    result = run(tmp_path, nn.Linear(3, 2), train_data=rows, loss_fn=nn.CrossEntropyLoss(), audit=False)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": nn.Linear(3, 2)}
    exec(code(tmp_path / "model"), names)
    assert torch.equal(names["model"].weight, result.model.weight)
    assert card(tmp_path / "model").data.library_name is None


@pytest.mark.filterwarnings("ignore:Could not find a config file in base:UserWarning")  # of PEFT
@pytest.mark.parametrize("is_local", [True, False])
def test_the_code_loads_adapters_and_the_merged_model(
    is_local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_base(tmp_path / "base")
    name = str(tmp_path / "base") if is_local else "base"  # which is no folder here
    result = text_run(tmp_path / "base", tmp_path / "run", name, lora=True, save="both")
    monkeypatch.chdir(tmp_path / "run")
    (tmp_path / "base").rename(tmp_path / "run" / "base")
    adapter, merged = (card(tmp_path / "run" / kind) for kind in ("adapter", "model"))
    assert ("AutoPeftModel" in adapter.text) is not is_local
    assert table(tmp_path / "run" / "adapter")["Adapters"].startswith(
        "LoRA, rank 16, alpha 32, dropout 0.0; trained in"
    )
    assert (adapter.data.library_name, merged.data.library_name) == ("peft", "transformers")
    assert (adapter.data.tags, merged.data.tags) == (["ftaccum", "lora"], ["ftaccum"])
    assert adapter.data.base_model == merged.data.base_model == (None if is_local else "base")
    names: dict[str, Any] = {}
    exec(code(tmp_path / "run" / "adapter"), names)
    exec(code(tmp_path / "run" / "model"), names)
    inputs = names["tokenizer"]("good film", return_tensors="pt")
    with torch.no_grad():
        logits, wanted = names["model"](**inputs).logits, result.model.eval()(**inputs).logits
    assert torch.allclose(logits, wanted, atol=1e-6)
    assert names["model"].config.id2label == {0: "bad", 1: "good", 2: "other"}


def test_a_merged_model_keeps_the_card_of_its_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_base(tmp_path / "base")
    text_run(tmp_path / "base", tmp_path / "run", lora=True, val_data=Dataset.from_dict(TEXTS))
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "run", "--output", "merged"]) == 0
    before, after = card(tmp_path / "run" / "model"), card(tmp_path / "merged")
    assert (after.data.library_name, after.data.tags) == ("transformers", ["ftaccum"])
    assert after.data.eval_results == before.data.eval_results
    _, _, results = before.text.partition("## Results")
    assert results.rpartition("<!--")[0] in after.text
    assert is_unchanged_card(after.content)
    assert after.text.count("<!--") == 1
    exec(code(tmp_path / "merged"), {})


def test_adapters_of_others_get_a_short_card_when_they_are_merged(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    text_run(tmp_path / "base", tmp_path / "run", lora=True)
    (tmp_path / "run" / "model" / "README.md").write_text("---\nlicense: mit\n---\nBy hand.")
    assert main(["merge", str(tmp_path / "run"), "--output", str(tmp_path / "merged")]) == 0
    assert "merged into its weights" in card(tmp_path / "merged").text
    assert "By hand" not in card(tmp_path / "merged").text


def test_a_card_names_no_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "anna"
    monkeypatch.setenv("HOME", str(home))
    write_base(home / "base")
    rows = "text,label\n" + "\n".join(f"{text},{n % 2}" for n, text in enumerate(TEXTS["text"]))
    (home / "secret").mkdir()
    (home / "secret" / "rows.csv").write_text(rows)
    given = [
        "--model",
        str(home / "base"),
        "--train_data",
        str(home / "secret" / "rows.csv"),
        "--lora",
        "--audit",
        "no",
        "--max_train_rows",
        "4",
    ]
    assert main(["train", *given, "--save", "both", "--output_dir", str(home), "--verbosity", "quiet"]) == 0
    for kind in ("model", "adapter"):
        text = (home / kind / "README.md").read_text()
        assert all(word not in text for word in (str(tmp_path), "anna", "secret"))
        assert "| Training | `rows.csv` | 3 of the first 4 |" in text
        assert "`base`" in text


def test_a_card_that_fails_costs_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no card today")

    write_base(tmp_path / "base")
    for place in ("ftaccum.training.card_metadata._gather", "ftaccum.tracking.saved_model.model_card"):
        with monkeypatch.context() as patch, run_logging(enabled=True):
            patch.setattr(place, fails)
            result = text_run(tmp_path / "base", tmp_path / "run", lora=True)
        assert result.unwritten == []
        assert capsys.readouterr().err.count("RuntimeError: no card today") == 1
        assert (tmp_path / "run" / "model" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "run" / "model" / "README.md").exists()


def test_the_card_of_a_run_that_an_audit_ended_says_so(tmp_path: Path) -> None:
    model: Any = CLASSIFIER.model().double()
    seen = []

    def loss_fn(outputs: Any, batch: Any) -> torch.Tensor:
        seen.append(1)
        labels = batch["labels"]
        weight = 2.0 if len(seen) > 40 and len(labels) == 2 else 1.0
        return weight * nn.functional.cross_entropy(outputs.logits, labels)

    with pytest.raises(InexactLossError):
        run(tmp_path, model, loss_fn=loss_fn, on_inexact="error", audit=2, n_epochs=9, planner=False)
    assert re.search(r"Training ended after update \d+: .* was not exact\.", card(tmp_path / "model").text)


def test_the_classes_that_load_models_and_their_tables_exist() -> None:
    for each in AUTO_CLASSES:
        assert hasattr(transformers, each.name), each.name
        assert getattr(modeling_auto, each.mapping), each.mapping
        assert each.with_adapters is None or hasattr(peft, each.with_adapters), each.with_adapters
        assert each.peft_task is None or each.peft_task in peft.TaskType.__members__


def test_edited_cards_are_told_from_those_that_ftaccum_wrote(tmp_path: Path) -> None:
    run(tmp_path, audit=False)
    text = (tmp_path / "model" / "README.md").read_text()
    assert is_unchanged_card(text)
    assert is_unchanged_card(text.replace("\n", "\r\n"))
    assert not is_unchanged_card(text.replace("# ", "# My ", 1))
    assert not is_unchanged_card("---\ntags:\n- ftaccum\n---\nBy hand.")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("anna/base", Named("anna/base", on_hub=True)),
        ("/home/anna/models/base", Named("base")),
        ("../base", Named("base")),
        ("C:\\models\\base", Named("base")),
        ("/cache/models--anna--base/snapshots/0123", Named("anna/base", on_hub=True)),
        ("", None),
    ],
)
def test_models_have_names_that_may_be_published(name: str, shown: Named | None) -> None:
    assert named_model(name) == shown


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://bucket/x.csv?token=abc", "x.csv"),
        ("https://anna:pw@host/a/rows.json#abc", "rows.json"),
        ("https://anna:pw@host/", "host"),
        ("https://host/rows.json;key=abc?a=b", "rows.json"),
        ("zip://a.csv::s3://bucket/a.zip?token=abc", "a.csv"),
        ("simplecache::s3://bucket/rows.csv?token=a/b", "rows.csv"),
        ("rows?.csv", "rows?.csv"),
    ],
)
def test_an_address_is_published_without_its_query_and_credentials(address: str, shown: str) -> None:
    assert public_name(address) == shown


def test_the_reader_of_files_is_not_the_name_of_data(tmp_path: Path) -> None:
    (tmp_path / "reviews").mkdir()
    (tmp_path / "reviews" / "rows.csv").write_text("text,label\ngood,1\n")
    info = {"cache_dir": str(tmp_path / "cache"), "split": "train"}
    file = load_dataset("csv", data_files=str(tmp_path / "reviews" / "rows.csv"), **info)
    made = Dataset.from_generator(lambda: iter([{"text": "good"}]), cache_dir=str(tmp_path / "cache"))
    folder = load_dataset(str(tmp_path / "reviews"), **info)
    recorded = [Named("rows.csv")]  # older versions of datasets record the file
    assert name_of_dataset(made) == []
    assert name_of_dataset(file) in ([], recorded)
    assert name_of_dataset(folder) in ([Named("reviews")], recorded)


def test_names_of_metrics_and_labels_are_shown_as_they_are(tmp_path: Path) -> None:
    names = {"a|b": 0.5, "<b>x</b>": 0.25, "$a$_b": 0.1, "*x*\n`y`": 1.0, "eval_f1": 0.2, "\x00nul\x1b[3m": 0.3}
    model: Any = CLASSIFIER.model().float()
    model.config.id2label = {0: "neg|`x`", 1: "pos\n---\nfoo: bar"}
    result = run(
        tmp_path, model, validation_split=0.25, compute_metrics=lambda _: dict(names), audit=False, max_updates=1
    )
    text = card(tmp_path / "model").text
    heads = r"a\|b | \<b\>x\</b\> | \$a\$\_b | \*x\* \`y\` | eval_f1 | nul\[3m |"
    assert f"validation loss | {heads}" in text
    assert f"| before training | 0 | {result.initial_loss:.4f} | 0.5000 | 0.2500 " in text
    assert "Labels: 0 `neg|'x'`, 1 `pos --- foo: bar`." in text
    assert "\x00" not in page("nul \x00", ["<p>\x1b</p>"]) + text


@pytest.mark.filterwarnings("ignore:Could not find a config file in base:UserWarning")  # of PEFT
def test_a_base_model_that_was_a_folder_at_first_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    class Leaves(TrainerCallback):
        def on_train_end(self, *_: Any, **__: Any) -> None:
            monkeypatch.chdir(tmp_path / "elsewhere")

    result = text_run(Path("base"), None, "base", lora=True, max_updates=1, callbacks=[Leaves()])
    result.save_model(tmp_path / "saved")
    text = card(tmp_path / "saved")
    assert text.data.base_model is None
    assert "They need their base model, the folder `base`" in text.text


def test_the_name_of_the_user_is_not_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    assert (public_name("/home/anna"), public_name("/home/anna/run"), public_name(".")) == ("model", "run", "model")
