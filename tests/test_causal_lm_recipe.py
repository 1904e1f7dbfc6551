"""The chat recipe: conversion of raw conversations, and a complete run."""

import json
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import pipeline

from chats import save_chat_model
from ftaccum import DataError, Result, SettingsError, TextWarning

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(autouse=True)
def _recipes_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(RECIPES), *sys.path])


@pytest.fixture
def recipe() -> ModuleType:
    import causal_lm

    return causal_lm


@pytest.fixture
def model(tmp_path: Path) -> str:
    return save_chat_model(tmp_path / "chat-model")


def conversations(file: Path, n: int, column: str = "messages") -> str:
    """Write conversations of different lengths. In 80 tokens, the last one has no room for an answer."""
    rows = [
        [{"role": "user", "content": "a" * (n if n > 1 else 99)}, {"role": "assistant", "content": "b" * (5 + n % 7)}]
        for n in range(n, 0, -1)
    ]
    file.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    return str(file)


def test_the_recipe_trains_a_model_that_answers_from_json_lines(
    recipe: ModuleType, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train = conversations(tmp_path / "train.jsonl", 18, "talk")
    val = conversations(tmp_path / "val.jsonl", 6, "talk")
    words = ["--model", model, "--train_data", train, "--val_data", val, "--columns", "messages=talk"]
    words += ["--max_length", "80", "--max_val_rows", "4", "--n_epochs", "2", "--learning_rate", "1e-2"]
    words += ["--batch_size", "2", "--effective_batch_size", "6", "--progress", "no"]
    words += ["--output_dir", str(tmp_path / "o")]
    with pytest.warns(TextWarning) as warned:
        recipe.main(words)
    sentence = "In `train_data`, 1 of 18 rows (the first is row 17) have no answer within 80 tokens and are skipped."
    assert sentence in [str(warning.message) for warning in warned]
    shown = capfd.readouterr().out
    assert "Training samples: 17\n" in shown
    assert "Validation samples: 4\n" in shown
    result = Result.load(tmp_path / "o")
    before, after = (recipe.perplexity(loss) for loss in (result.initial_loss, result.final_loss))
    assert f"Held-out perplexity: {before:.2f} before, {after:.2f} after\n" in shown
    assert after < before / 2
    talk = pipeline("text-generation", model=str(tmp_path / "o" / "model"), device="cpu")
    answer = talk([{"role": "user", "content": "aaa"}], max_new_tokens=4, do_sample=False)[0]["generated_text"][-1]
    assert answer == {"role": "assistant", "content": "bbbb"}


def test_bad_input_is_reported_in_one_sentence(recipe: ModuleType, model: str, tmp_path: Path) -> None:
    rows = conversations(tmp_path / "rows.jsonl", 6)
    spoiled = tmp_path / "spoiled.jsonl"
    spoiled.write_text(Path(rows).read_text() + '{"messages": [{"role": "user", "text": "Hello"}]}\n')
    mute = save_chat_model(tmp_path / "mute", None)
    for words, error, sentence in (
        (["--max_length", "0"], SettingsError, "`max_length` must be a positive integer or None, but is 0 instead"),
        (["--n_epochs", "0"], SettingsError, "`n_epochs` must be a positive integer"),
        (["--max_length", "129"], SettingsError, "`max_length` is 129, but .* accept at most 128 tokens"),
        (["--max_length", "10"], DataError, "No row of `train_data` has an answer within 10 tokens. Raise"),
        (
            ["--train_data", str(spoiled)],
            DataError,
            "row 6: message 0 of `messages`, .* has no content",
        ),
        (["--columns", "messages=talk"], DataError, "has no column 'talk' for the messages"),
        (["--model", mute], SettingsError, "has no chat template"),
        (["--model", str(tmp_path / "absent")], SettingsError, "cannot be loaded"),
    ):
        with pytest.raises(error, match=sentence):
            recipe.main(["--model", model, "--train_data", rows, "--max_length", "80", *words])


def test_bad_input_ends_with_status_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["causal_lm.py", "--max_lenght", "80"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(RECIPES / "causal_lm.py"), run_name="__main__")
    assert done.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("causal_lm: There is no option '--max_lenght'. Did you mean '--max_length'?")
