"""The help pages of the command line."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Literal

import pytest

from ftaccum.apps.cli import COMMANDS, main
from ftaccum.apps.examples import EXAMPLES
from ftaccum.apps.help import HelpPage
from ftaccum.apps.options import OPTIONS
from ftaccum.fields import traits_of

DECLARED = {f.name: f for kinds in OPTIONS.values() for kind in kinds for f in fields(kind)}


def page(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as done:
        main(words)
    assert not done.value.code
    return capsys.readouterr().out


def test_help_shows_ten_options_and_help_all_shows_each_once_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    short, long = page(capsys, "train", "--help"), page(capsys, "train", "--help-all")
    assert sum(line.startswith("  --") for line in short.splitlines()) == 10
    shown = [line.split()[0] for line in long.splitlines() if line.startswith("  --")]
    assert sorted(shown) == sorted([f"--{f.name}" for kind in OPTIONS["train"] for f in fields(kind)] + ["--config"])
    groups = [line.rstrip(":") for line in long.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert set(groups) == {traits_of(f).group for kind in OPTIONS["train"] for f in fields(kind)} | {"other"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_page(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert page(capsys, command, "--help").startswith(f"usage: ftaccum {command}")


def test_help_names_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert page(capsys, "help", "plan") == page(capsys, "plan", "--help")
    assert main(["help"]) == 0
    assert "commands:" in capsys.readouterr().out


def test_options_of_one_name_have_their_own_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--sampler balanced" in page(capsys, "train", "--help-all")
    assert "--sampler random" in page(capsys, "search", "--help-all")


def test_every_option_with_a_value_has_an_example() -> None:
    takes_value = {name for name, f in DECLARED.items() if not isinstance(f.default, bool) or f.default is MISSING}
    assert takes_value - EXAMPLES.keys() == set()
    assert EXAMPLES.keys() - DECLARED.keys() == set()


def test_an_option_with_fixed_choices_shows_them() -> None:
    @dataclass
    class Options:
        activation: Literal["relu", "tanh"] = field(default="relu", metadata={"help": "the activation"})

    assert "--activation relu|tanh" in HelpPage("usage", "").show([Options], everything=True)
