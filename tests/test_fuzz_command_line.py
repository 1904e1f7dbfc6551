"""Any settings file and any arguments of the command are read correctly or refused with a message."""

import contextlib
import inspect
import io
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from ftaccum import SettingsError, plan
from ftaccum.apps.cli import main
from ftaccum.apps.parser import parse
from ftaccum.arguments import parse_settings
from ftaccum.settings.recipe import Recipe
from ftaccum.settings.runtime import Runtime
from fuzzing import fuzz


@pytest.fixture
def config(tmp_path: Path) -> Callable[[bytes], list[str]]:
    def written(content: bytes) -> list[str]:
        (tmp_path / "settings.yaml").write_bytes(content)
        return ["--config", str(tmp_path / "settings.yaml")]

    return written


_YAML_VALUES = st.sampled_from(
    [
        "1",
        "2.0",
        "1e-5",
        "yes",
        "off",
        "~",
        "none",
        "[1, 1e-3, 0]",
        "{a: 1}",
        "0:2,3:4",
        "'x'",
        "",
        "\t1",
        "&a [*a]",
        "- 1",
    ]
)
_YAML_KEYS = st.sampled_from(
    [*inspect.signature(plan).parameters, "n_trials", "batch-size", "3", "~", "? [a]", "<<", "x"]
)
_YAML = st.lists(st.tuples(_YAML_KEYS, _YAML_VALUES), max_size=4).map(
    lambda lines: "\n".join(f"{key}: {value}" for key, value in lines).encode()
)


@pytest.mark.slow
@fuzz(examples=50)
@given(content=_YAML | st.binary() | st.text().map(lambda text: text.encode(errors="surrogatepass")))
@example(b"[" * 3000)
@example(b"n_epochs: 2\nn_epochs: 3")
@example(b"n_epochs: " + b"9" * 5000)
def test_any_file_is_read_or_refused(config: Callable[[bytes], list[str]], content: bytes) -> None:
    assert _status(["plan", *config(content)]) in (0, 2)


_WORDS = st.lists(
    st.sampled_from(
        [f"--{name}" for name in inspect.signature(plan).parameters] + ["--planner", "--config", "--", "-n"]
    )
    | st.sampled_from(["3", "x", "1e-5", "none", "-1", "nan", "9" * 5000, "0:2,3:4", "=", "carry", ""])
    | st.text(max_size=5).filter(lambda word: not word.startswith("-")),
    max_size=6,
)


@fuzz(examples=100)
@given(words=_WORDS)
def test_any_arguments_are_read_or_refused(words: list[str]) -> None:
    assert _status(["plan", *words]) in (0, 2)


def _status(words: list[str]) -> int:
    """Return the exit status of the command, and check that it prints an error exactly if that is not 0."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        status = main(words)
    assert (status == 0) == (not said.getvalue())
    return status


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--n_epochs", "x"], "`n_epochs` must be a positive integer, but is 'x' instead. It means: passes over"),
        (["--n_epochs"], "`--n_epochs` needs one argument."),
        (["--n_trials", "3"], "There is no option '--n_trials'. It is an option of `ftaccum search`."),
        (["--n_trials=3"], "There is no option '--n_trials=3'. It is an option of `ftaccum search`."),
        (["--accumulation_steps", "3"], "'--accumulation_steps'; here: `--gradient_accumulation_steps`."),
    ],
)
def test_an_error_about_an_option_gives_the_reason(
    capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert main(["plan", *words]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("n_trials: 3", "has the unknown key 'n_trials'. It is an option of `ftaccum search`."),
        ("batch-size: 3", "has the unknown key 'batch-size'. Did you mean 'batch_size'?"),
        ("n_epochs: 1\nn_epochs: 2", "cannot be read: 'n_epochs' appears twice"),
        ("1: 2", "has the unknown key 1. `--help-all` lists the options."),
        ("recipe: {n_epochs: 1}", "has the unknown key 'recipe'. `--help-all` lists the options."),
        ("- n_epochs: 1", "must hold `name: value` lines, but holds [{'n_epochs': 1}] instead"),
        ("", "must hold `name: value` lines, but holds None instead"),
        ("n_epochs: x", "`n_epochs` must be a positive integer, but is 'x' instead"),
    ],
)
def test_an_error_about_a_file_gives_the_reason(
    capsys: pytest.CaptureFixture[str], config: Callable[[bytes], list[str]], content: str, sentence: str
) -> None:
    assert main(["plan", *config(content.encode())]) == 2
    assert sentence in capsys.readouterr().err


def test_scalars_of_a_file_follow_yaml_1_2(config: Callable[[bytes], list[str]]) -> None:
    """In YAML 1.1, `no` is False, 1e-5 a string, and 1:30 the number 90."""
    words = config(b"mixed_precision: no\nplanner: off\nprogress: yes\nplanner_costs: [1e2, 1, 1e-4]\nbatch_size: 8")
    (runtime,) = parse([Runtime], words).options
    read = (runtime.mixed_precision, runtime.planner, runtime.progress, runtime.planner_costs, runtime.batch_size)
    assert read == ("no", False, True, [100.0, 1, 0.0001], 8)
    (recipe,) = parse([Recipe], config(b"learning_rate: 1e-5\ngradient_accumulation_steps: 1:30")).options
    assert recipe.learning_rate == 1e-5
    with pytest.raises(SettingsError, match=r"or pairs .*, but is \[\[1, 30\]\] instead"):
        parse_settings(vars(recipe))


def test_the_parser_refuses_values_of_options_without_a_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "--accumulation_steps", "1", "x"]) == 2
    assert "`--accumulation_steps` must be a whole number, but is 'x' instead." in capsys.readouterr().err


def test_verify_refuses_bad_settings_before_it_loads_rows(capsys: pytest.CaptureFixture[str]) -> None:
    named = ["verify", "--model", "absent", "--train_data", "absent.csv"]
    for words, sentence in ((["--n_splits", "-3"], "`n_splits` must"), (["--batch_size", "0"], "`batch_size` must")):
        assert main([*named, *words]) == 2
        assert sentence in capsys.readouterr().err
