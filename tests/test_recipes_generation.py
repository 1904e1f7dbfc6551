"""The recipes that train models of text: chat, plain text, and texts from texts."""

import runpy
from pathlib import Path

import pytest
from transformers import AutoModelForSeq2SeqLM, pipeline

from chats import save_chat_model
from ftaccum import Result
from recipe_runs import RECIPES, run_recipe
from task_files import save_rows
from test_task_seq2seq import end_tokenizer, save_model

UPDATES = ["--max_updates", "2", "--progress", "no"]


def chat_words(folder: Path) -> list[str]:
    """Return options that train a tiny chat model with LoRA."""
    pytest.importorskip("peft")
    rows = [
        {"messages": [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b" * (n % 3 + 1)}]}
        for n in range(1, 13)
    ]
    train = save_rows(folder / "chats.jsonl", rows)
    return ["--model", save_chat_model(folder / "chat-model"), "--train_data", train, "--lora"]


def causal_lm_words(folder: Path) -> list[str]:
    """Return options that train a tiny language model on packed lines of text."""
    file = folder / "corpus.txt"
    file.write_text("".join("ab" * n + "\n" for n in range(1, 25)), encoding="utf-8")
    words = ["--model", save_chat_model(folder / "model"), "--train_data", str(file)]
    return [*words, "--packing", "--max_length", "20", "--batch_size", "2", "--tokens_per_update", "60"]


def seq2seq_words(folder: Path) -> list[str]:
    """Return options that train a tiny encoder-decoder."""
    rows = [{"source": "a good film", "target": "good"}, {"source": "the plot", "target": "the plot"}] * 6
    train = save_rows(folder / "pairs.jsonl", rows)
    model = save_model(folder / "seq2seq-model", end_tokenizer())
    return ["--model", model, "--train_data", train, "--max_target_length", "4"]


def test_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run_recipe("chat", *chat_words(tmp_path), *UPDATES, "--save", "both", "--output_dir", str(out)) == 0
    assert "Held-out perplexity of the answers: " in capsys.readouterr().out
    for folder in ("model", "adapter"):
        talk = pipeline("text-generation", model=str(out / folder), device="cpu")
        said = talk([{"role": "user", "content": "aaa"}], max_new_tokens=4, do_sample=False)[0]["generated_text"][-1]
        assert said["role"] == "assistant"


def test_causal_lm(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_recipe("causal_lm", *causal_lm_words(tmp_path), *UPDATES, "--output_dir", str(out)) == 0
    assert Result.load(out).effective_batch_size == 3
    assert pipeline("text-generation", model=str(out / "model"), device="cpu")("ab", max_new_tokens=4)


def test_seq2seq(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_recipe("seq2seq", *seq2seq_words(tmp_path), *UPDATES, "--output_dir", str(out)) == 0
    assert {"error_rate", "exact_match"} <= set(Result.load(out).metrics[-1])
    AutoModelForSeq2SeqLM.from_pretrained(out / "model")


@pytest.mark.parametrize(
    ("found", "wanted", "errors"),
    [("", "", 0), ("a b c", "a b c", 0), ("", "a b", 2), ("a b", "", 2), ("b c d", "a b d", 2), ("a x c", "a b c", 1)],
)
def test_an_error_rate_counts_changes_of_words(
    found: str, wanted: str, errors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))
    distance = runpy.run_path(str(RECIPES / "seq2seq.py"))["distance"]
    assert distance(found.split(), wanted.split()) == errors
