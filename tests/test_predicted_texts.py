"""`ftaccum predict` with models that generate text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chats import TWO_TURNS, save_chat_model
from ftaccum.apps.cli import main
from task_files import save_rows


def predicted(model: str, task: str, rows: list[dict[str, Any]], folder: Path) -> list[str]:
    words = ["--data", save_rows(folder / "rows.jsonl", rows), "--output", str(folder / "out.jsonl"), "--task", task]
    assert main(["predict", model, *words, "--max_new_tokens", "5", "--batch_size", "2", "--progress", "no"]) == 0
    return [json.loads(line)["prediction"] for line in (folder / "out.jsonl").read_text().splitlines()]


def generated(model: str, prompts: list[str]) -> list[str]:
    """Return what plain Transformers generates for each prompt alone."""
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            found = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        texts.append(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return texts


def test_a_chat_model_answers_the_last_message_of_each_row(tmp_path: Path) -> None:
    model = save_chat_model(tmp_path / "chat")
    talks = [TWO_TURNS, TWO_TURNS[:2], [{"role": "user", "content": "A much longer question, is it?"}]]
    template = AutoTokenizer.from_pretrained(model).apply_chat_template
    asked = [TWO_TURNS[:4], TWO_TURNS[:2], talks[2]]
    prompts = [template(talk, tokenize=False, add_generation_prompt=True) for talk in asked]
    rows = [{"messages": talk} for talk in talks]
    assert predicted(model, "chat", rows, tmp_path) == generated(model, prompts)
    assert predicted(model, "chat", [{"prompt": "Who?"}], tmp_path) == generated(
        model, [template([{"role": "user", "content": "Who?"}], tokenize=False, add_generation_prompt=True)]
    )


def test_a_language_model_continues_each_text(tmp_path: Path) -> None:
    model, texts = save_chat_model(tmp_path / "lm"), ["Once upon", "A", "It was a dark night"]
    assert predicted(model, "causal-lm", [{"text": text} for text in texts], tmp_path) == generated(model, texts)


def test_a_task_without_predictions_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--task", "masked-lm", "--data", "x.csv", "--output", str(tmp_path / "out.csv")]
    assert main(["predict", save_chat_model(tmp_path / "m"), *words]) == 2
    assert "`ftaccum predict` has no predictions for the task 'masked-lm'." in capsys.readouterr().err
