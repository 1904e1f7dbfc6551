"""The command, the recipes and YAML files, as a user runs them."""

import csv
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from datetime import date
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import BertTokenizerFast, pipeline

from ftaccum import OutputWarning, Result, SettingsError
from ftaccum.apps.cli import main
from ftaccum.apps.parser import parse
from ftaccum.arguments import parse_settings
from ftaccum.settings.recipe import Recipe
from ftaccum.settings.runtime import Runtime
from ftaccum.tasks.arguments import NamedArguments, TrainArguments
from heads import HEADS, relative_error

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny encoder, its tokenizer, and labelled text as CSV."""
    folder = tmp_path_factory.mktemp("tiny")
    HEADS["sequence classification, BERT"].model().float().save_pretrained(folder / "model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "the"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder / "model")
    rows = [(f"{'a ' * (n % 5)}{('good', 'bad')[n % 2]} film", ("positive", "negative")[n % 2]) for n in range(40)]
    for name, header in (("rows.csv", ("text", "label")), ("other.csv", ("sentence", "feeling"))):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    return folder


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the folder `outputs` of commands without `--output_dir` out of the project."""
    monkeypatch.chdir(tmp_path_factory.mktemp("working"))


def test_allow_changed_is_read_from_flags_and_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for words, text in (
        (["--allow_changed", "learning_rate,n_epochs"], ""),
        ([], "allow_changed: learning_rate,n_epochs"),
        ([], "allow_changed: [learning_rate, n_epochs]"),
    ):
        file.write_text(text + "\nresume: off\n")
        recipe, runtime = parse([Recipe, Runtime], [*words, "--config", str(file)]).options
        assert parse_settings(vars(recipe) | vars(runtime))[1].allow_changed == ["learning_rate", "n_epochs"]
        assert parse_settings(vars(runtime))[1].resume is None


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--n_rows", "1000", "--batch-size", "4", "--effective_batch_size", "30"]) == 0
    assert "Gradient accumulation steps: 8\n" in capsys.readouterr().out
    assert main(["plan", "--n_rows", "1000", "--tokens_per_update", "524288", "--tokens_per_row", "2048"]) == 0
    assert "Gradient accumulation steps: 64\n" in capsys.readouterr().out


def test_plan_with_windows_of_different_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--gradient_accumulation_steps", "0:2,100:8", "--learning_rate_scaling", "linear", "--remainder", "carry"]
    assert main(["plan", "--n_rows", "1000", "--max_updates", "110", *words]) == 0
    shown = capsys.readouterr().out
    assert "Gradient accumulation steps: 2, after 100 updates 8\n" in shown
    assert "Learning rate factor: 1, after 100 updates 4\n" in shown
    assert "Updates per epoch: 103, 7 (the remainder of an epoch is carried into the next)\n" in shown
    assert "110 updates in all (`max_updates`), the last of them in epoch 2\n" in shown
    assert main(["plan", "--gradient_accumulation_steps", "0:2,x:8"]) == 2
    assert "or pairs (from_update, k)" in capsys.readouterr().err


def test_steps_are_the_same_from_flags_and_from_a_file(tmp_path: Path) -> None:
    yaml = tmp_path / "settings.yaml"
    others = "remainder: carry\nmax_updates: 200\n"
    yaml.write_text(f"gradient_accumulation_steps: [[0, 2], [100, 8]]\n{others}")
    (from_lists,) = parse([Recipe], ["--config", str(yaml)]).options
    yaml.write_text(f"gradient_accumulation_steps: 0:2,100:8\n{others}")
    (from_text,) = parse([Recipe], ["--config", str(yaml)]).options
    flags = ["--gradient_accumulation_steps", "0:2,100:8", "--remainder", "carry", "--max_updates", "200"]
    (from_flags,) = parse([Recipe], flags).options
    from_python = {"gradient_accumulation_steps": "0:2,100:8", "remainder": "carry", "max_updates": 200}
    wanted = Recipe(gradient_accumulation_steps=[[0, 2], [100, 8]], remainder="carry", max_updates=200)
    for given in (from_python, vars(from_lists), vars(from_text), vars(from_flags)):
        assert parse_settings(given)[0] == wanted
    assert parse([Recipe], ["--gradient_accumulation_steps", "4"]).options[0].gradient_accumulation_steps == 4


def test_a_file_may_use_the_other_name_of_a_flag(tmp_path: Path) -> None:
    yaml = tmp_path / "settings.yaml"
    yaml.write_text("data: x.csv\n")
    assert parse([NamedArguments], ["--config", str(yaml)]).options[0].train_data == "x.csv"
    yaml.write_text("data: x.csv\ntrain_data: y.csv\n")
    with pytest.raises(SettingsError, match="sets 'train_data' twice, once as 'data'"):
        parse([NamedArguments], ["--config", str(yaml)])


def test_bad_input_is_reported_in_one_sentence_with_status_2(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    yaml = tmp_path / "settings.yaml"
    yaml.write_text("learnig_rate: 1.0e-3\n")
    model, rows = str(tiny / "model"), str(tiny / "rows.csv")
    for words, sentence in (
        (["search", "--max_updates", "9"], "There is no option '--max_updates'"),
        (["plan", "--batch_size", "0"], "ftaccum plan: `batch_size` must be a positive integer, but is 0 instead."),
        (["train", "--model", model], "`--train_data` is required"),
        (["train", "--model", model, "--train_data", rows, "--n_epochs", "0"], "`n_epochs` must be a positive integer"),
        (
            ["train", "--model", model, "--train_data", "absent.csv"],
            "`train_data` 'absent.csv': there is no such file",
        ),
        (
            ["train", "--model", "/absent", "--train_data", rows],
            "`model` '/absent': there is no such folder. Check the path.",
        ),
        (["train", "--model", f"{model}x", "--train_data", rows], f"no such folder. Did you mean {model!r}?"),
        (["train", "--model", "some/absent", "--train_data", rows], "there is no such folder here, and the hub cannot"),
        (
            ["train", "--model", model, "--train_data", rows, "--tokenizer", "./absent"],
            "`tokenizer` './absent': there is no such folder",
        ),
        (
            ["train", "--model", model, "--train_data", rows, "--label_column", "x"],
            "no column 'x' for the label",
        ),
        (["train", "--model", model, "--train_data", rows, "--task", "x"], "`task` must be one of"),
        (["train", "--config", str(yaml)], "has the unknown key 'learnig_rate'. Did you mean 'learning_rate'?"),
        (["train", "--config", str(tmp_path / "absent.yaml")], "cannot be read"),
        (["train", "--batchsize", "3"], "There is no option '--batchsize'. Did you mean '--batch_size'?"),
        (["fly"], "there is no command 'fly'"),
    ):
        assert main(words) == 2
        assert sentence in capsys.readouterr().err


def test_a_run_that_diverged_is_reported_with_status_1(capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    """An actual divergence: with weights of 1e38, the second update has no finite number."""
    words = ["--model", str(tiny / "model"), "--train_data", str(tiny / "rows.csv"), "--learning_rate", "1e38"]
    assert main(["train", *words, "--nonfinite_patience", "2", "--validation_split", "0", "--progress", "False"]) == 1
    said = capsys.readouterr().err
    assert "These are all the rows that were run, so the weights may not be finite. The number of such updates" in said
    assert "in a row has reached 2" in said
    assert "Traceback" not in said


def test_train_from_flags_over_a_file(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = tmp_path / "settings.yaml"
    yaml.write_text("n_epochs: 1\nbatch_size: 2\nlearning_rate: 1.0e-3\ngradient_clip_norm: 0.5\n")
    words = ["train", "--config", str(yaml), "--model", str(tiny / "model"), "--train_data", str(tiny / "other.csv")]
    words += ["--text_columns", "sentence", "--label_column", "feeling", "--batch_size", "4"]
    assert (
        main([*words, "--gradient_clip_norm", "none", "--output_dir", str(tmp_path / "out"), "--progress", "no"]) == 0
    )
    result = Result.load(tmp_path / "out" / "result.json")
    assert (result.batch_size, result.optimizer_steps) == (4, 9)
    assert result.lr_history[0] == 1e-3
    assert result.metrics[0].keys() == {"accuracy", "f1", "precision", "recall"}
    assert "FINE-TUNING TEST" in capsys.readouterr().out


def test_a_run_without_an_output_folder_is_saved_and_resumes(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--model", str(tiny / "model"), "--train_data", str(tiny / "rows.csv"), "--max_updates", "2"]
    words += ["--no_progress", "--audit", "false"]
    assert main(words) == 0
    (folder,) = Path("outputs").iterdir()
    assert folder.name == f"model-rows-{date.today()}"
    assert (folder / "model" / "model.safetensors").exists()
    shown = capsys.readouterr().out
    assert f"\nOutputs: {folder.absolute()}\n" in shown
    assert f": ftaccum {' '.join(words)} --resume auto --output_dir {folder}\n" in shown
    record = json.loads((folder / "run.json").read_text())
    named = {"model": str(tiny / "model"), "train_data": str(tiny / "rows.csv"), "task": "text-classification"}
    assert named.items() <= record["sources"].items()
    assert {f.name for f in fields(TrainArguments)} | {"lora"} == record["sources"].keys()

    (folder / "run.json").write_text(json.dumps(record | {"finished": False}))  # as if it was killed right before
    assert main([*words, "--resume", "auto"]) == 0
    told = capsys.readouterr().err
    assert f"Resuming the newest unfinished run with these settings: {folder}, of " in told
    assert "This run already ended with update 2" in told
    assert main([*words, "--resume", "auto"]) == 0
    assert "There is no unfinished run with these settings in 'outputs'. Starting a new one" in capsys.readouterr().err
    assert sorted(path.name for path in Path("outputs").iterdir()) == [folder.name, f"{folder.name}-2"]


def test_a_run_that_is_refused_leaves_no_output_folder(tiny: Path) -> None:
    words = ["train", "--model", str(tiny / "model"), "--train_data", str(tiny / "rows.csv"), "--no_progress"]
    assert main([*words, "--log_with", "dvclive"]) == 2
    assert not Path("outputs").exists()


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_agree_on_the_output_folder(
    tiny: Path, tmp_path: Path, two_processes: Callable[..., str]
) -> None:
    shown = two_processes("output_folder_of_two.py", str(tmp_path), str(tiny / "model"), str(tiny / "rows.csv"))
    (folder,) = (tmp_path / "outputs").iterdir()
    assert folder.name.startswith("model-rows-")
    assert shown.count(f"\nOutputs: {folder}\n") == 1
    assert shown.count("There is no unfinished run with these settings in 'outputs'.") == 1
    record = json.loads((folder / "run.json").read_text())
    assert (record["num_processes"], record["finished"]) == (2, True)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.slow
def test_columns_are_named_by_flags_and_in_files(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, yaml = tmp_path / "rows.csv", tmp_path / "settings.yaml"
    rows = [(f"x{n}", f"{'good' if n % 2 else 'bad'} film", n % 2, ("no", "yes")[n % 2]) for n in range(12)]
    with data.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "review", "label", "liked"), *rows])
    named = ["--model", str(tiny / "model"), "--train_data", str(data), "--progress", "no"]
    command = ["train", *named, "--n_epochs", "1"]
    assert main(command) == 2
    assert "`train_data` has 3 columns of text: 'id' ('x0'), 'review' ('bad film'), 'liked'" in capsys.readouterr().err
    assert main([*command, "--text_columns", "revue"]) == 2
    assert "no column 'revue' to read texts from" in capsys.readouterr().err
    for words, line in (
        (["--text_columns", "review"], "Text: column 'review'; labels: 'label'; left out: 'id', 'liked'\n"),
        (
            ["--text_columns", "review,id"],
            "Text: pairs of columns 'review', 'id'; labels: 'label'; left out: 'liked'\n",
        ),
        (["--text_columns", "review", "--label_column", "liked"], "labels: 'label'; left out: 'id'\n"),
        (["--text_columns", "review", "--label_column", "label"], "labels: 'label'; left out: 'id', 'liked'\n"),
    ):
        assert main([*command, *words]) == 0
        assert line in capsys.readouterr().out
    for text in ("text_columns: review", "text_columns: [review]", "text_column: review"):
        yaml.write_text(text)
        assert main(["verify", *named, "--config", str(yaml)]) == 0
        assert "Text: column 'review'; labels: 'label'; left out: 'id', 'liked'\n" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_that_cannot_be_saved_gives_status_1(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ftaccum.tracking.export.save_model", full)
    words = ["train", "--model", str(tiny / "model"), "--train_data", str(tiny / "rows.csv"), "--n_epochs", "1"]
    with pytest.warns(OutputWarning, match=r"model' cannot be written: OSError: \[Errno 28\] No space left"):
        assert main([*words, "--output_dir", str(tmp_path / "out"), "--progress", "no"]) == 1
    assert "No space left" in Result.load(tmp_path / "out").unwritten[0]


def test_batch_size_is_a_number_or_auto_and_costs_are_three_numbers() -> None:
    words = ["--batch_size", "auto", "--effective_batch_size", "8", "--planner_costs", "64", "1", "0.001"]
    recipe, runtime = parse_settings(
        {**vars(parse([Recipe], words[2:4]).options[0]), **vars(parse([Runtime], words[:2]).options[0])}
    )
    assert (recipe.effective_batch_size, runtime.batch_size) == (8, "auto")
    (runtime,) = parse([Runtime], ["--batch_size", "16", *words[4:]]).options
    assert (runtime.batch_size, runtime.planner_costs) == (16, [64.0, 1.0, 0.001])


def recipe(*words: str, launcher: tuple[str, ...] = ()) -> str:
    command = [sys.executable, *launcher, str(RECIPES / "text_classification.py"), *words, "--progress", "no"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(Path(words[-1]) / "datasets")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.processes
def test_the_recipe_gives_the_same_model_on_one_process_and_on_two(tiny: Path, tmp_path: Path) -> None:
    words = ["--model", str(tiny / "model"), "--train_data", str(tiny / "rows.csv"), "--n_epochs", "2"]
    words += ["--batch_size", "4", "--effective_batch_size", "8", "--learning_rate", "1e-3"]
    alone = recipe(*words, "--output_dir", str(tmp_path / "one"))
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(RECIPES / "two_cpu_processes.yaml"))
    together = recipe(*words, "--output_dir", str(tmp_path / "two"), launcher=launcher)
    assert "\nmetrics               accuracy " in alone
    assert together.count("FINE-TUNING TEST") == 1
    assert "Processes: 2" in together
    one, two = (Result.load(tmp_path / name / "result.json") for name in ("one", "two"))
    assert (one.num_processes, two.num_processes) == (1, 2)
    assert two.loss_history == pytest.approx(one.loss_history, rel=1e-4)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    assert relative_error(weights[1], weights[0]) < 1e-4

    classify = pipeline("text-classification", model=str(tmp_path / "two" / "model"), device="cpu")
    assert classify("a good film")[0]["label"] in ("positive", "negative")


@pytest.mark.slow
def test_a_launch_that_silently_starts_one_process_of_two_is_refused(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += [str(RECIPES / "text_classification.py"), "--model", str(tiny / "model")]
    command += ["--train_data", str(tiny / "rows.csv")]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode != 0
    assert "2 processes were requested, but this run would have 1" in done.stderr


@pytest.mark.slow
def test_the_arguments_of_another_launch_are_ignored() -> None:
    code = "from ftaccum.runtime.accelerator import requested_processes as n; assert n() == 1"
    words = f": accelerate launch --num_processes 2 train.py; {sys.executable} -c '{code}'; true"
    assert subprocess.run(["bash", "-c", words]).returncode == 0


@pytest.mark.slow
def test_search(capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path) -> None:
    command = [
        "search", "--model", str(tiny / "model"), "--train_data", str(tiny / "rows.csv"), "--n_epochs", "1",
        "--accumulation_steps", "1", "2", "--learning_rate", "1e-4", "1e-2", "--no_progress",
        "--space", "weight_decay=1e-3:0.1:log", "lr_scheduler=linear,constant", "warmup_steps=0:2",
        "--output_dir", str(tmp_path),
    ]  # fmt: skip
    assert main([*command, "--n_trials", "3"]) == 0
    without_model = "No model was saved. To train the best one and save it, run the same command with `--refit`."
    assert without_model in capsys.readouterr().out
    assert main([*command, "--n_trials", "4", "--refit"]) == 0  # continues the search
    assert without_model not in capsys.readouterr().out
    with (tmp_path / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == ["0", "1", "2", "3"]
    assert {row["lr_scheduler"] for row in rows} <= {"linear", "constant"}
    assert all(1e-3 <= float(row["weight_decay"]) <= 0.1 for row in rows)
    classifier = pipeline("text-classification", model=str(tmp_path / "best" / "model"))
    assert classifier("a good film")[0]["label"] in ("positive", "negative")
    capsys.readouterr()
    assert main([*command, "--n_trials", "4", "--batch_size", "8"]) == 2
    assert "was created with `batch_size` 4, and this search has 8" in capsys.readouterr().err


def test_errors_about_search_options_give_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    named = ["search", "--model", "absent", "--train_data", "absent.csv"]
    for words, sentence in (
        ([*named, "--workers", "0"], "`n_workers` must be a positive integer, but is 0 instead."),
        ([*named, "--pruner", "halving"], "`pruner` must be 'successive_halving', 'hyperband', 'median', 'none'"),
        ([*named, "--space", "weight_decay"], "`space` has 'weight_decay'. Give name=lowest:highest"),
        ([*named, "--space", "weight_decay=a:b"], "`space` has 'weight_decay=a:b'. Give name=lowest:highest"),
        ([*named, "--n_epochs", "0"], "`n_epochs` must be a positive integer"),
        ([*named, "--effective_batch_size", "8"], "There is no option '--effective_batch_size'."),
        (["search"], "`--model` is required"),
    ):
        assert main(words) == 2
        assert sentence in capsys.readouterr().err


def test_an_unknown_metric_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.csv").write_text("text,label\ngood,1\n")
    options = ["--model", "no such model", "--train_data", str(tmp_path / "rows.csv"), "--greater_is_better", "true"]
    assert main(["train", *options, "--metric_for_best", "acuracy"]) == 2
    assert "Choose one of: val_loss, accuracy, f1, precision, recall" in capsys.readouterr().err
