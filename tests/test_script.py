"""Training scripts: their options, defaults, errors and exit statuses."""

import logging
import sys
from collections.abc import Callable
from dataclasses import MISSING, InitVar, dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import optuna
import pytest
from datasets import Dataset

from ftaccum import DataError, DivergedError, ScriptOptions, run_script
from ftaccum.apps.cli import main
from ftaccum.settings.recipe import Recipe
from ftaccum.tasks.adapter_options import AdapterOptions

OF_TASK = {"task": "text-classification", "model": "a-model", "train_data": Path("rows.csv"), "val_data": "held.csv"}


@dataclass
class Extra:
    temperature: float = field(default=2.0, metadata={"help": "temperature of the teacher"})


@dataclass(frozen=True)
class Many:
    names: list[str] = field(default_factory=lambda: ["a"], metadata={"help": "some names"})
    sizes: list[int] | None = field(default=None, metadata={"help": "some sizes"})
    rate: float = 1.0
    limit: int | None = None
    fast: bool = False
    shown: bool = True
    kind: Literal["soft", "hard"] = "soft"
    folder: Path = Path("here")


@dataclass(frozen=True)
class Checked:
    width: int = 16

    def __post_init__(self) -> None:
        if self.width % 4:
            raise ValueError("`width` must be a multiple of 4.")


def run(main_function: Callable[[ScriptOptions], Any], *words: str, **given: Any) -> int:
    with pytest.raises(SystemExit) as done:
        run_script(main_function, arguments=words, **given)
    assert isinstance(done.value.code, int)
    return done.value.code


def options(*words: str, **given: Any) -> ScriptOptions:
    """Return the options that the main function of a script gets."""
    found: list[ScriptOptions] = []
    assert run(found.append, *words, **given) == 0
    return found[0]


def test_a_script_gets_its_defaults_and_options() -> None:
    found = options("--max_length", "64", "--learning_rate", "3e-4", "--lora", **OF_TASK)
    assert found.data["train_data"] == "rows.csv"
    assert (found.data["val_data"], found.data["max_length"]) == ("held.csv", 64)
    assert found.settings["learning_rate"] == 3e-4
    assert found.data["lora"] == found.settings["lora"] == {}
    assert "max_length" not in found.settings  # `load_task` passes it on


def test_given_training_data_come_without_the_default_validation_data(tmp_path: Path) -> None:
    assert options(**OF_TASK).data["val_data"] == "held.csv"
    assert options("--train_data", "mine.csv", **OF_TASK).data["val_data"] is None
    assert options("--train_data", "mine.csv", "--val_data", "held.csv", **OF_TASK).data["val_data"] == "held.csv"
    file = tmp_path / "run.yaml"
    file.write_text("val_data: held.csv\n")
    assert options("--train_data=mine.csv", "--config", str(file), **OF_TASK).data["val_data"] == "held.csv"
    file.write_text("train_data: rows.csv\n")
    assert options("--config", str(file), **OF_TASK).data["val_data"] is None


def test_a_limit_in_the_file_does_not_outlive_the_default_validation_data(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("max_val_rows: 3\n")
    words = ["--config", str(file)]
    assert options(*words, **OF_TASK).data["max_val_rows"] == 3
    assert options(*words, "--train_data", "mine.csv", **OF_TASK).data["max_val_rows"] is None
    both = options(*words, "--train_data", "mine.csv", "--val_data", "mine_too.csv", **OF_TASK)
    assert both.data["max_val_rows"] == 3

    file.write_text("train_data: mine.csv\n")
    assert options(*words, max_val_rows=3, **OF_TASK).data["max_val_rows"] is None


def test_validation_data_of_extra_options_need_no_limit() -> None:
    @dataclass
    class Named:
        train_data: str = "rows.csv"
        val_data: str | None = "held.csv"

    assert options("--train_data", "mine.csv", extra=Named).extra == Named("mine.csv", None)


def test_flags_override_the_file_and_the_file_overrides_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("batch_size: 2\nn_epochs: 5\ntemperature: 3.0\n")
    found = options("--config", str(file), "--n_epochs", "7", extra=Extra, batch_size=1, loss_over="window")
    assert (found.settings["batch_size"], found.settings["n_epochs"], found.settings["loss_over"]) == (2, 7, "window")
    assert found.extra == Extra(3.0)
    assert found.data == {}
    assert set(found.settings) >= set(Recipe.__dataclass_fields__)


def test_extra_options_have_the_types_of_their_fields(tmp_path: Path) -> None:
    words = ["--names", "b", "c", "--sizes", "3", "4", "--rate", "2", "--limit", "5", "--fast", "--no_shown"]
    expected = Many(["b", "c"], [3, 4], 2.0, 5, True, False, "hard", Path("there"))
    found = options(*words, "--kind", "hard", "--folder", "there", extra=Many)
    assert found.extra == expected
    file = tmp_path / "run.yaml"
    file.write_text(
        "names: [b, c]\nsizes: [3, 4]\nrate: 2\nlimit: 5\nfast: yes\nshown: false\nkind: hard\nfolder: there\n"
    )
    found = options("--config", str(file), extra=Many)
    assert found.extra == expected
    assert type(found.extra.rate) is float
    assert options("--limit", "none", "--fast", "no", extra=Many, limit=3).extra == Many()


def test_extra_options_may_include_those_of_ftaccum() -> None:
    @dataclass
    class Combined(AdapterOptions):
        scale: float = 1.0

    found = options("--lora", "--lora_targets", "query,value", "--scale", "2", extra=Combined)
    assert list(found.extra.lora_argument()["target_modules"]) == ["query", "value"]
    assert found.extra.scale == 2.0


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("names: b", "`names` must be a list, each entry a text, but is 'b' instead."),
        ("sizes: [3, x]", "`sizes` must be a list, each entry an integer or None, but is [3, 'x'] instead."),
        ("rate: [1.0]", "`rate` must be a number, but is [1.0] instead."),
        ("limit: 1.5", "`limit` must be an integer or None, but is 1.5 instead."),
        ("limit: true", "`limit` must be an integer or None, but is True instead."),
        ("fast: 3", "`fast` must be True or False, but is 3 instead."),
        ("kind: loud", "`kind` must be one of 'soft', 'hard', but is 'loud' instead."),
        ("rate: null\nfast: 3", "`rate` must be a number, but is None instead.\n`fast` must be"),
    ],
)
def test_a_file_with_a_value_of_another_type_is_refused(
    line: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(line)
    assert run(lambda _: pytest.fail("the script started"), "--config", str(tmp_path / "run.yaml"), extra=Many) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind", "default", "expected"),
    [
        ("size", int, MISSING, "`extra` has the field 'size' without a default. Give it one."),
        ("size", InitVar[int], MISSING, "`extra` has the field 'size' without a default. Give it one."),
        ("size", tuple[int, ...], (), "`extra` has the field 'size' of a type that no option can have."),
        ("size", int | float, 1, "`extra` has the field 'size' of a type that no option can have."),
    ],
)
def test_extra_options_that_cannot_be_given_are_refused(
    name: str, kind: Any, default: Any, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    declared = make_dataclass("Declared", [(name, kind, field(default=default))])
    assert run(lambda _: pytest.fail("the script started"), extra=declared) == 2
    assert expected in capsys.readouterr().err
    assert run(lambda _: pytest.fail("the script started"), extra=int) == 2
    assert "`extra` must be a dataclass, but is <class 'int'> instead." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("batch_size", "--batch-size"),
        ("data", "--data"),
        ("config", "--config"),
        ("help_all", "--help-all"),
        ("no_lora", "--no-lora"),
        ("no_fast", "--no-fast"),
    ],
)
def test_extra_options_with_a_flag_of_another_option_are_refused(
    name: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    declared = make_dataclass("Declared", [("fast", bool, True), (name, int, 1)])
    assert run(lambda _: pytest.fail("the script started"), extra=declared, **OF_TASK) == 2
    assert f"`extra` has the field {name!r}, but {flag!r} is a flag of another option." in capsys.readouterr().err


def test_a_script_may_have_defaults_that_can_change(capsys: pytest.CaptureFixture[str]) -> None:
    found = options(extra=Many, names=["x"], sizes=[4], freeze=["*.embeddings"], **OF_TASK)
    assert (found.extra.names, found.extra.sizes, found.data["freeze"]) == (["x"], [4], ["*.embeddings"])
    assert run(lambda _: pytest.fail("the script started"), lora={"r": 2}, **OF_TASK) == 2
    assert "`lora` must be True or False, but is {'r': 2} instead." in capsys.readouterr().err


def test_the_dataclass_of_extra_options_is_built_once(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass
    class Doubled:
        size: int = 1
        halves: list[float] = field(init=False)

        def __post_init__(self) -> None:
            if self.size < 1:
                raise ValueError("`size` must be positive.")
            self.halves, self.size = [self.size / 2], 2 * self.size

    found = options("--size", "5", extra=Doubled, batch_size=1)
    assert (found.extra.size, found.extra.halves) == (10, [2.5])
    assert options(extra=Doubled, size=3).extra.size == 6
    assert run(lambda _: pytest.fail("the script started"), "--size", "0", extra=Doubled) == 2
    assert capsys.readouterr().err.endswith(": `size` must be positive.\n")


def test_entries_and_alternatives_have_the_types_of_extra_options(tmp_path: Path) -> None:
    @dataclass
    class Lists:
        folders: list[Path] | None = None
        rates: list[float] = field(default_factory=list)
        flags: list[bool] = field(default_factory=list)
        size: str | float = "all"

    file = tmp_path / "run.yaml"
    file.write_text("folders: [a, b]\nrates: [1, 2.5]\nflags: [false]\nsize: 2\n")
    found = options("--config", str(file), extra=Lists).extra
    assert found == Lists([Path("a"), Path("b")], [1.0, 2.5], [False], 2.0)
    assert [type(each) for each in (*found.rates, found.size)] == [float] * 3
    found = options("--flags", "no", "yes", "--size", "most", "--folders", "none", extra=Lists, folders=["a"]).extra
    assert found == Lists(None, [], [False, True], "most")


def test_help_shows_extra_options_and_those_that_most_need(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda _: pytest.fail("the script started"), "--help", description="What it does.", extra=Extra) == 0
    page = capsys.readouterr().out
    assert "What it does." in page
    assert "temperature of the teacher (default: 2.0)" in page
    assert "--learning_rate" in page
    assert "--adam_beta1" not in page
    assert run(lambda _: pytest.fail("the script started"), "--help", **OF_TASK) == 0
    assert "(default: a-model)" in (page := capsys.readouterr().out)
    assert "required" not in page
    assert run(lambda _: pytest.fail("the script started"), "--help-all", extra=Many) == 0
    assert "--adam_beta1" in (everything := capsys.readouterr().out)
    assert "--limit" in everything


@pytest.mark.parametrize(
    ("words", "shown"), [([], True), (["--progress", "no"], False), (["--verbosity", "quiet"], False)]
)
def test_a_script_shows_the_bars_and_messages_that_a_run_shows(
    words: list[str], shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    def main(_: ScriptOptions) -> None:
        Dataset.from_dict({"x": [1, 2]}).map(lambda row: row)
        logging.getLogger("ftaccum").info("a message")

    were_disabled = datasets.are_progress_bars_disabled()
    assert run(main, *words) == 0
    assert datasets.are_progress_bars_disabled() == were_disabled
    written = capsys.readouterr().err
    assert ("Map" in written) == shown
    assert ("a message" in written) == ("--verbosity" not in words)


def test_a_search_script_has_the_options_of_a_search() -> None:
    found = options("--n_trials", "3", "--space", "weight_decay=1e-4:0.1:log", for_search=True, **OF_TASK)
    assert found.settings["n_trials"] == 3
    assert found.settings["space"]["weight_decay"].log
    assert "learning_rate" in found.settings
    assert "effective_batch_size" not in found.settings


@pytest.mark.parametrize(
    ("words", "given", "expected"),
    [
        (["--batch_size", "0"], {}, "`batch_size` must be a positive integer"),
        (["--batch_sise", "2"], {}, "There is no option '--batch_sise'. Did you mean '--batch_size'?"),
        ([], {"task": "text-classification"}, "`--model` is required."),
        ([], {"temprature": 2.0}, "`run_script` has the default 'temprature', but the script has no such option."),
        (["--dtype", "float8"], OF_TASK, "`dtype` must be"),
        (["--task", "masked-lm"], OF_TASK, "There is no option '--task'"),
        (["--max_val_rows", "3", "--train_data", "x"], OF_TASK, "`max_val_rows` is 3, but `val_data` is None. Give"),
    ],
)
def test_bad_input_ends_a_script_before_it_starts(
    words: list[str], given: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lambda _: pytest.fail("the script started"), *words, **given) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--save", "merged"], "`save` is 'merged', but there are no adapters to merge"),
        (["--early_stopping_patience", "2", "--validation_split", "0"], "`early_stopping_patience` needs validation"),
        (["--metric_for_best", "f2"], "`metric_for_best`"),
        (["--packing"], "`packing` is an option of the task 'causal-lm'"),
        (["--max_val_rows", "3"], "`max_val_rows` is 3, but `val_data` is None."),
        (["--columns", "stars"], "`columns` has 'stars', which is not role=column."),
    ],
)
def test_a_script_and_the_command_refuse_the_same_before_they_load(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"model": "/absent", "train_data": "/absent.csv"}
    given = {"task": "text-classification", **named}
    assert run(lambda _: pytest.fail("the script started"), *words, **given) == 2
    by_script = capsys.readouterr().err
    assert expected in by_script
    flags = [word for name, value in given.items() for word in (f"--{name}", value)]
    assert main(["train", *flags, *words]) == 2
    assert capsys.readouterr().err.partition(": ")[2] == by_script.partition(": ")[2]


def test_a_script_with_an_unknown_task_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda _: pytest.fail("the script started"), model="m", train_data="t", task="nope") == 2
    assert "`task` must be one of" in capsys.readouterr().err


def test_a_script_checks_its_extra_options_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert options("--width", "8", extra=Checked).extra == Checked(8)
    assert options(extra=Checked, width=4).extra == Checked(4)
    assert run(lambda _: pytest.fail("the script started"), "--width", "6", extra=Checked) == 2
    assert capsys.readouterr().err.endswith("`width` must be a multiple of 4.\n")
    (tmp_path / "run.yaml").write_text("width: [4]")
    assert run(lambda _: pytest.fail("the script started"), "--config", str(tmp_path / "run.yaml"), extra=Checked) == 2
    assert "`width` must be an integer, but is [4] instead." in capsys.readouterr().err


@pytest.mark.parametrize(("error", "status"), [(DataError("no rows"), 2), (DivergedError("not finite"), 1)])
def test_an_error_of_a_run_becomes_a_message_and_a_status(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_: ScriptOptions) -> None:
        raise error

    assert run(main) == status
    assert str(error) in capsys.readouterr().err


def test_an_output_that_could_not_be_written_fails_a_script() -> None:
    @dataclass
    class Unwritten:
        unwritten: list[str]

    assert run(lambda _: Unwritten(["the model"])) == 1
    assert run(lambda _: Unwritten([])) == 0


def test_a_search_without_a_finished_trial_fails_a_script() -> None:
    study = optuna.create_study()
    assert run(lambda _: study, for_search=True) == 1
    study.add_trial(optuna.trial.create_trial(value=0.5))
    assert run(lambda _: study, for_search=True) == 0


@pytest.mark.parametrize(("returned", "status"), [(3, 3), (False, 1), (256, 1), ({"loss": 1.0}, 1)])
def test_what_main_returns_is_an_exit_status_or_fails_the_script(
    returned: Any, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lambda _: returned) == status
    refused = f"`main` returned {returned!r}, which tells neither success nor failure."
    assert (refused in capsys.readouterr().err) == (status == 1)
