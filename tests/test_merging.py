"""`ftaccum merge`, and adapters from the command line."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertTokenizerFast,
    LlamaForCausalLM,
    pipeline,
)
from transformers.pipelines import Pipeline

from ftaccum import SettingsError
from ftaccum.apps.cli import main
from ftaccum.apps.options import OPTIONS
from ftaccum.apps.parser import parse
from ftaccum.tasks.adapter_options import AdapterOptions
from heads import HEADS

LLAMA = HEADS["causal LM, Llama"]
CLASSES = ("negative", "neutral", "positive")


def options(*words: str) -> AdapterOptions:
    return parse([AdapterOptions], words).options[0]


def test_each_option_turns_adapters_on() -> None:
    assert options().lora_argument() is None
    assert options("--lora").lora_argument() == {}
    assert options("--lora_r", "8", "--lora_alpha", "4").lora_argument() == {"r": 8, "lora_alpha": 4}
    assert options("--lora_dropout", "0.1").lora_argument() == {"lora_dropout": 0.1}
    assert options("--lora_targets", "q_proj, v_proj").lora_argument() == {"target_modules": ["q_proj", "v_proj"]}
    assert options("--lora_targets", "all-linear").lora_argument() == {"target_modules": "all-linear"}
    assert options("--lora_dora").lora_argument() == {"use_dora": True}
    assert options("--modules_to_save", "lm_head").lora_argument() == {"modules_to_save": ["lm_head"]}


def test_a_file_sets_adapters(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("lora_r: 8\nlora_targets: [q_proj]\n")
    wanted = {"r": 8, "target_modules": ["q_proj"]}
    assert options("--config", str(tmp_path / "run.yaml")).lora_argument() == wanted


@pytest.mark.parametrize(("words", "sentence"), [
    (("--lora_r", "0"), "`lora_r` must be a positive integer or None, but is 0"),
    (("--lora_dropout", "1"), "`lora_dropout` must be a number from 0 to below 1 or None, but is 1.0"),
    (("--lora_alpha", "big"), "`lora_alpha` must be a positive number or None, but is 'big'"),
])  # fmt: skip
def test_bad_options_are_named(words: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(SettingsError, match=f"^{sentence}"):
        options(*words).lora_argument()


def test_commands_that_load_a_model_to_train_have_the_options_of_adapters() -> None:
    commands = [command for command, kinds in OPTIONS.items() if AdapterOptions in kinds]
    assert commands == ["train", "preview", "search", "verify"]


@pytest.mark.parametrize("command", ["verify", "search"])
def test_verify_and_search_pass_adapters_on(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, lora: Any, **__: Any) -> None:
        raise SettingsError([f"given: {lora}"])

    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"ftaccum.apps.{command}.api.{command}", refuse)
    assert main([command, "--model", "base", "--train_data", "rows.csv", "--lora_r", "4"]) == 2
    assert capsys.readouterr().err.endswith("given: {'r': 4}\n")


def write_inputs(folder: Path) -> None:
    """Write a tiny language model, which lacks the pooler and the head of a classifier, and texts of three classes."""
    config = {**HEADS["masked LM, BERT"].config.to_dict(), "architectures": None}
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**config)).save_pretrained(folder / "base")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "fine", "film", "a"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder / "base")
    rows = [(f"{'a ' * (n % 4)}{('bad', 'fine', 'good')[n % 3]} film", CLASSES[n % 3]) for n in range(24)]
    with (folder / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def scores(classify: Pipeline, text: str) -> dict[str, float]:
    return {each["label"]: each["score"] for each in classify(text, top_k=None)}


def test_adapters_of_a_new_classifier_are_merged_for_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    train = [
        "train",
        "--model",
        "base",
        "--train_data",
        "rows.csv",
        "--audit",
        "false",
        "--no_progress",
        "--output_dir",
    ]
    settings = ["--lora_r", "4", "--lora_dora", "--save", "both", "--learning_rate", "1e-2", "--n_epochs", "1"]
    assert main([*train, "run", *settings]) == 0
    assert "trained in full: bert.pooler.dense, classifier; " in capsys.readouterr().out
    assert json.loads(Path("run/run.json").read_text())["sources"]["lora"] == {"r": 4, "use_dora": True}

    assert main(["merge", "run", "--output", "merged"]) == 0
    assert capsys.readouterr().out == "Merged run/adapter into merged.\n"
    classify = pipeline("text-classification", model="merged")
    assert scores(classify, "a good film").keys() == set(CLASSES)
    # The run has merged its own model in memory.
    assert scores(classify, "a good film") == scores(pipeline("text-classification", model="run/model"), "a good film")
    assert sorted(path.name for path in Path("merged").iterdir()) == sorted(
        path.name for path in Path("run/model").iterdir()
    )

    # The base model has moved.
    shutil.move("base", "elsewhere")
    capsys.readouterr()  # the progress bars of `pipeline`
    for words, sentence in (
        (["run", "--output", "again"], "The base model 'base' of the adapters cannot be loaded: "),
        (["run", "--output", "merged"], "`--output` is 'merged', which is not empty. Give a new folder."),
        (["run/model", "--output", "again"], "'run/model' is a plain model without adapters, so there is nothing"),
        (["elsewhere", "--output", "again"], "'elsewhere' is a plain model without adapters, so there is nothing"),
        (["run/checkpoints", "--output", "again"], "'run/checkpoints' contains no adapters: there is no file 'adapter"),
        (["nowhere", "--output", "again"], "There is no folder 'nowhere'. Give the output folder of a run"),
        (["--output", "again"], "RUN is required: the output folder of a run, as in `ftaccum merge RUN --output"),
        (["run"], "`--output` is required."),
    ):
        assert main(["merge", *words]) == 2
        assert f"ftaccum merge: {sentence}" in capsys.readouterr().err
        assert not Path("again").exists()
    assert main(["merge", "run", "--output", "again", "--base", "elsewhere"]) == 0
    assert Path("again/model.safetensors").read_bytes() == Path("merged/model.safetensors").read_bytes()


def adapter_of(folder: Path, base: str, **lora: Any) -> Path:
    """Write adapters for a causal language model, as PEFT does, and return their folder."""
    import peft

    model = LLAMA.model().float()
    model.name_or_path = base
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **lora)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(folder)
    return folder


def test_adapters_without_weights_that_their_base_model_lacks_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import peft

    write_inputs(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base")  # with a new pooler
    config = peft.LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 2
    assert "lacks the weights bert.pooler.dense.bias, bert.pooler.dense.weight, and the" in capsys.readouterr().err


def test_adapters_that_ftaccum_did_not_write_are_merged(tmp_path: Path) -> None:
    base = LLAMA.model().float()
    base.save_pretrained(tmp_path / "base")
    adapter_of(tmp_path / "adapter", str(tmp_path / "base"))
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    same = [name for name, p in base.named_parameters() if torch.equal(p, merged.get_parameter(name))]
    assert all("proj" not in name for name in same)
    assert len(same) == sum("proj" not in name for name, _ in base.named_parameters())


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_adapters_without_the_name_of_their_base_model_need_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter_of(tmp_path, "")
    assert main(["merge", str(tmp_path), "--output", str(tmp_path / "merged")]) == 2
    assert "do not name their base model. Give its name or folder as `--base`." in capsys.readouterr().err


def test_adapters_of_another_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LLAMA.config.to_dict() | {"hidden_size": 8, "head_dim": 4}
    LlamaForCausalLM(type(LLAMA.config)(**config)).save_pretrained(tmp_path / "base")
    adapter_of(tmp_path / "adapter", str(tmp_path / "base"))
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 2
    assert "do not fit the base model" in capsys.readouterr().err
