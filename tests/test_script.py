"""Training scripts: their options, defaults, errors and exit statuses."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ftaccum import DataError, DivergedError, ScriptOptions, run_script
from ftaccum.settings.recipe import Recipe

OF_TASK = {"task": "text-classification", "model": "a-model", "train_data": Path("rows.csv"), "val_data": "held.csv"}


@dataclass
class Own:
    temperature: float = field(default=2.0, metadata={"help": "temperature of the teacher"})


def run(main: Callable[[ScriptOptions], Any], *words: str, **given: Any) -> int:
    with pytest.raises(SystemExit) as done:
        run_script(main, arguments=words, **given)
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


def test_other_training_data_come_without_the_default_validation_data() -> None:
    assert options("--train_data", "mine.csv", **OF_TASK).data["val_data"] is None
    assert options("--train_data", "mine.csv", "--val_data", "other.csv", **OF_TASK).data["val_data"] == "other.csv"


def test_flags_override_the_file_and_the_file_overrides_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("batch_size: 2\nn_epochs: 5\ntemperature: 3.0\n")
    found = options("--config", str(file), "--n_epochs", "7", own=Own, batch_size=1, loss_over="window")
    assert (found.settings["batch_size"], found.settings["n_epochs"], found.settings["loss_over"]) == (2, 7, "window")
    assert found.own == Own(3.0)
    assert found.data == {}
    assert set(found.settings) >= set(Recipe.__dataclass_fields__)


def test_a_search_script_has_the_options_of_a_search() -> None:
    found = options("--n_trials", "3", "--space", "weight_decay=1e-4:0.1:log", searches=True, **OF_TASK)
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
        ([], {"temprature": 2.0}, "`run_script` has the default 'temprature', which is no option of the script."),
        (["--dtype", "float8"], OF_TASK, "`dtype` must be"),
    ],
)
def test_bad_input_ends_a_script_before_it_starts(
    words: list[str], given: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lambda _: pytest.fail("the script started"), *words, **given) == 2
    assert expected in capsys.readouterr().err


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
