"""The names of other libraries: the table, and what it answers in Python, on the command line and in YAML files."""

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments, ViTConfig

import ftaccum
from ftaccum import SettingsError
from ftaccum.apps.cli import main
from ftaccum.apps.options import OPTIONS
from ftaccum.porting.names import TABLES
from ftaccum.training.config import faults_of_config

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import coming_from

ROWS = [row for table in TABLES.values() for row in table]
FOREIGN = {name for row in ROWS for name in row.names.split()}
ARGUMENTS = set(inspect.signature(ftaccum.test_fine_tuning).parameters)
TRAIN_OPTIONS = {f.name for kind in OPTIONS["train"] for f in fields(kind)}


def refusal(call: Callable[[], Any]) -> list[str]:
    """Return the sentences of the SettingsError that a call raises."""
    with pytest.raises(SettingsError) as raised:
        call()
    return list(raised.value.faults)


def test_every_answer_names_arguments_that_exist() -> None:
    targets = {target for row in ROWS for target in row.targets}
    assert targets - ARGUMENTS - TRAIN_OPTIONS == set()


def test_no_foreign_name_is_an_argument() -> None:
    assert [name for name in FOREIGN if name in ARGUMENTS] == []


def test_every_row_answers_something() -> None:
    assert [row.names for row in ROWS if not (row.targets or row.note)] == []
    assert [row.names for row in ROWS if row.note and not row.note.endswith(".")] == []


def test_a_name_of_several_libraries_has_one_answer() -> None:
    answers: dict[str, set[str]] = {}
    for row in ROWS:
        for name in row.names.split():
            answers.setdefault(name, set()).add(row.here)
    assert {name: found for name, found in answers.items() if len(found) > 1} == {}


def test_every_setting_of_trainer_has_an_answer() -> None:
    settings = {f.name for f in fields(TrainingArguments) if not f.name.startswith("_")}
    parameters = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert (settings | parameters) - FOREIGN - ARGUMENTS == set()


def test_the_page_has_the_table() -> None:
    assert coming_from.PAGE.read_text(encoding="utf-8") == coming_from.page()


def test_the_names_that_the_page_calls_the_same_are_the_same() -> None:
    text = coming_from.PAGE.read_text(encoding="utf-8")
    listed = text[text.index("are the same here:") : text.index("These defaults differ")]
    same = set(listed.split("`")[1::2])
    theirs = {f.name for f in fields(TrainingArguments)} | set(inspect.signature(Trainer.__init__).parameters)
    assert same
    assert same <= theirs & ARGUMENTS


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("per_device_train_batch_size", "; here: `batch_size`."),
        ("bf16", '; here: `mixed_precision="bf16"`.'),
        ("group_by_length", ". Not needed. Rows are drawn at random, and the planner sorts the rows of each update"),
        ("max_train_samples", "; on the command line: `max_train_rows`. In Python, give fewer rows."),
        ("batchsize", ". Did you mean 'batch_size'?"),
        ("learn", ". Did you mean 'learning_rate' or 'learning_rate_scaling'?"),
        ("physical_batch_size", ". `help(ftaccum.test_fine_tuning)` lists the arguments."),
    ],
)
def test_an_unknown_argument_is_answered(name: str, sentence: str) -> None:
    (fault,) = refusal(lambda: ftaccum.test_fine_tuning(nn.Linear(3, 2), **{name: 1}))
    assert fault.startswith(f"`{name}` is not an argument of `test_fine_tuning`{sentence}")


def test_one_error_answers_all_unknown_arguments() -> None:
    faults = refusal(lambda: ftaccum.test_fine_tuning(lr=1, epochs=1, nonsense=1))
    assert [fault.split("`")[1] for fault in faults] == ["lr", "epochs", "nonsense"]


def test_a_missing_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'model'"):
        ftaccum.test_fine_tuning()
    with pytest.raises(TypeError, match="takes 1 positional argument"):
        ftaccum.plan(1000, 4)


def test_the_other_functions_answer_unknown_arguments() -> None:
    model = nn.Linear(3, 2)
    assert refusal(lambda: ftaccum.plan(1000, lr=1, micro_batch_size=1)) == [
        "`lr` is not an argument of `plan`. `learning_rate` is an argument of `test_fine_tuning`.",
        "`micro_batch_size` is not an argument of `plan`; here: `batch_size`.",
    ]
    assert refusal(lambda: ftaccum.verify(model, train_dataset=[], train_data=[], val_data=[])) == [
        "`train_dataset` is not an argument of `verify`; here: `data`.",
        "`train_data` is not an argument of `verify`; here: `data`.",
        "`val_data` is not an argument of `verify`. It is an argument of `test_fine_tuning`.",
    ]
    steps, model_init, most = refusal(lambda: ftaccum.search(lambda: model, accum_steps=2, model_init=1, max_steps=1))
    assert steps.startswith("`accum_steps` is not an argument of `search`; here: `accumulation_steps`.")
    assert model_init.endswith("Give `model_factory`, which returns one.")
    assert most.endswith("`n_epochs` is the budget of each trial.")
    space, _ = refusal(lambda: ftaccum.search(lambda: model, space={"wd": 1}))
    assert space.endswith("is not an argument of `test_fine_tuning`; here: `weight_decay`.")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "--per_device_train_batch_size", "8"], "'--per_device_train_batch_size'; here: `--batch_size`."),
        (["train", "--per-device-train-batch-size=8"], "size=8'; here: `--batch_size`."),
        (["train", "--bf16"], "There is no option '--bf16'; here: `--mixed_precision bf16`."),
        (["train", "--disable_tqdm", "true"], "; here: `--progress false`."),
        (["train", "-lr", "3"], "train: There is no option '-lr'; here: `--learning_rate`.\n"),
        (["train", "--processing_class", "x"], "'--processing_class'; here: `--tokenizer`."),
        (["train", "--max_steps", "9"], "here: `--max_updates`. The epochs may end training earlier: set `--n_epochs`"),
        (["train", "--learn", "3"], "There is no option '--learn'. Did you mean '--learning_rate' or"),
        (["train", "--conf", "x.yaml"], "There is no option '--conf'."),
        (["train", "--physical_batch_size", "3"], "'--physical_batch_size'. `--help-all` lists the options.\n"),
        (
            ["plan", "--lr", "1"],
            "'--lr'. `--learning_rate` is an option of `ftaccum train`, `ftaccum preview`, `ftaccum search`.",
        ),
        (["search", "--accum_steps", "1"], "'--accum_steps'; here: `--accumulation_steps`."),
    ],
)
def test_an_unknown_option_is_answered(capsys: pytest.CaptureFixture[str], words: list[str], sentence: str) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines(keepends=True)
    assert sentence in line


def test_unknown_keys_of_a_file_are_answered(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "axolotl.yaml"
    file.write_text("micro_batch_size: 2\nbf16: auto\nbase_model: x\nsample_packing: true\nphysical_batch_size: 3\n")
    assert main(["train", "--config", str(file)]) == 2
    found = capsys.readouterr().err
    for sentence in (
        "key 'micro_batch_size'; here: `batch_size`.\n",
        "key 'bf16'; here: `mixed_precision: bf16`.\n",
        "key 'base_model'; here: `model`.",
        "key 'sample_packing'; here: `padding_free: true`.",
        "key 'physical_batch_size'. `--help-all` lists the options.\n",
    ):
        assert sentence in found


def test_the_command_shows_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ftaccum {ftaccum.__version__}\n"


class Indexed(torch.utils.data.Dataset):
    def __getitem__(self, index: int) -> int:
        return index


class Streamed(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(())


@pytest.mark.parametrize(
    "rows",
    [
        [{"input_ids": [1, 2]}],
        {"text": ["a", "b"]},
        Dataset.from_dict({"text": ["a", "b"]}),
        Dataset.from_dict({"text": ["a", "b"]}).to_iterable_dataset(),
        pd.DataFrame({"text": ["a", "b"]}),
        Indexed(),
        Streamed(),
        torch.utils.data.DataLoader([1, 2]),
        iter([1, 2]),
    ],
    ids=lambda rows: type(rows).__name__,
)
def test_rows_in_place_of_the_configuration_are_refused(rows: Any) -> None:
    wanted = f"but is {type(rows).__name__} instead, which looks like rows. The second positional argument is `config`:"
    (fault,) = refusal(lambda: ftaccum.test_fine_tuning(nn.Linear(3, 2), rows))
    assert wanted in fault
    assert "write `train_data=` before the training rows" in fault


def test_a_search_refuses_rows_in_place_of_the_configuration_before_it_makes_a_model() -> None:
    def make_model() -> nn.Module:
        raise AssertionError

    (fault,) = refusal(lambda: ftaccum.search(make_model, [{"input_ids": [1]}]))
    assert "write `train_data=`" in fault


@dataclass
class TrainingSettings:
    per_device_train_batch_size: int = 8


def test_arguments_of_a_trainer_in_place_of_the_configuration_are_refused() -> None:
    (fault,) = refusal(lambda: ftaccum.test_fine_tuning(nn.Linear(3, 2), TrainingSettings()))
    assert fault.startswith("`config` must be the model's configuration, but is TrainingSettings instead. Give each of")


def test_configurations_are_not_taken_for_rows() -> None:
    class Attributes(dict):
        vocab_size = 3

    assert [faults_of_config(config) for config in (None, ViTConfig(), Attributes(vocab_size=3))] == [[], [], []]
