"""The task `chat`: forms of conversations, which tokens are learned, and the gradient of answers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel

from chats import FORGETS_THOUGHTS, MARKED, NO_END_TOKEN, PLAIN, REFUSES, TWO_TURNS, learned, save_chat_model
from chats import tokenizer_with as tokenizer_of
from exactness import accumulated_gradients, windows_of
from ftaccum import DataError, SettingsError, TextWarning, load_task, test_fine_tuning
from ftaccum.apps.cli import main
from ftaccum.tasks.chat_tokens import encoded
from ftaccum.tasks.conversations import Conversation
from heads import all_in_float64, relative_error

ANSWERS = ["Me.\nAnd you 🦜?<|end|>", "Fine.<|end|>"]
TOOLS = (
    "{% for t in tools or [] %}{{ t.name }};{% endfor %}{{ mood }}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def row_of(messages: Sequence[Any], tokenizer: Any, limit: int | None = None) -> dict[str, list[int]]:
    ids, labels, _ = encoded(Conversation(messages), tokenizer, limit)
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_answers_and_their_end_of_turn_have_labels(template: str) -> None:
    tokenizer = tokenizer_of(template)
    row = row_of(TWO_TURNS, tokenizer)
    assert learned(row, tokenizer) == ANSWERS
    assert row["input_ids"] == tokenizer.apply_chat_template(TWO_TURNS, return_dict=False)


def test_text_after_an_answer_has_labels_if_no_token_ends_a_turn() -> None:
    tokenizer = tokenizer_of(NO_END_TOKEN)
    assert learned(row_of(TWO_TURNS, tokenizer), tokenizer) == ["Me.\nAnd you 🦜?\n", "Fine.\n"]


def test_a_token_that_spans_prompt_and_answer_belongs_to_the_answer() -> None:
    tokenizer = tokenizer_of(NO_END_TOKEN, ("Ġ", "F"))  # the prompt's last space and the answer's first letter
    assert learned(row_of(TWO_TURNS, tokenizer), tokenizer)[-1] == " Fine.\n"


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_long_conversations_are_cut_at_the_end(template: str) -> None:
    tokenizer = tokenizer_of(template)
    whole = row_of(TWO_TURNS, tokenizer)
    first_answer = next(n for n, label in enumerate(whole["labels"]) if label != -100)
    for length, stretches in ((first_answer + 2, ["Me"]), (first_answer, [])):
        row = row_of(TWO_TURNS, tokenizer, length)
        assert row == {name: column[:length] for name, column in whole.items()}
        assert learned(row, tokenizer) == stretches


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_first_message_may_be_an_answer(template: str) -> None:
    tokenizer = tokenizer_of(template)
    assert learned(row_of(TWO_TURNS[2:], tokenizer), tokenizer) == ANSWERS


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_answers_within_a_prompt_have_no_labels(template: str) -> None:
    tokenizer = tokenizer_of(template)
    conversation = Conversation.of_row({"prompt": TWO_TURNS[:4], "completion": TWO_TURNS[4:]})
    ids, labels, _ = encoded(conversation, tokenizer, None)
    assert learned({"input_ids": ids, "labels": labels}, tokenizer) == ANSWERS[1:]


def test_a_template_that_cannot_format_messages_is_reported_in_one_sentence() -> None:
    for template, messages, words in (
        (FORGETS_THOUGHTS, TWO_TURNS, "formats the messages before message 2 differently if more follow"),
        (REFUSES, TWO_TURNS, "cannot format these messages: roles must alternate"),
        ("{{ messages[0].content }}", TWO_TURNS[2:], "does not show where it begins"),
    ):
        with pytest.raises(DataError, match=words):
            row_of(messages, tokenizer_of(template))
    one_answer = row_of(TWO_TURNS[:3], tokenizer_of(FORGETS_THOUGHTS))
    assert learned(one_answer, tokenizer_of(PLAIN)) == ["(thinks) Me.\nAnd you 🦜?<|end|>"]


def test_a_conversation_is_the_same_in_all_forms() -> None:
    turns = [("user", "Who?"), ("assistant", "Me.")]
    wanted = [{"role": role, "content": text} for role, text in turns]
    sharegpt = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in turns]
    for row in (
        {"messages": wanted},
        {"messages": json.dumps(wanted)},
        {"messages": [{**message, "tool_calls": None} for message in wanted]},
        {"messages": sharegpt},
        {"prompt": "Who?", "completion": "Me."},
        {"prompt": wanted[:1], "completion": wanted[1:]},
        {"prompt": json.dumps(wanted[:1]), "completion": "Me."},
    ):
        assert Conversation.of_row(row) == Conversation(wanted), row


def test_rows_that_are_no_conversations_are_refused() -> None:
    user = {"role": "user", "content": "Hi"}
    for row, words in (
        ({"messages": []}, r"`messages` must be a list such as .* but is \[\] instead"),
        ({"messages": None}, "but is None instead"),
        ({"messages": "Hello"}, "is 'Hello', which is not JSON"),
        ({"messages": ["Hello"]}, r"but is \['Hello'\] instead"),
        ({"messages": [user, {"content": "Hi"}]}, "message 1 of `messages` has no role, only 'content'"),
        ({"messages": [user, {"role": "assistant", "text": "Hi"}]}, "of the role 'assistant', has no content"),
        ({"messages": [{"from": "bot", "value": "Hi"}]}, "is from 'bot', but must be from one of 'human'"),
        ({"messages": [user], "tools": {"name": "f"}}, "`tools` must be a list of JSON schemas, or None"),
        ({"messages": [user], "chat_template_kwargs": "[1]"}, r"`chat_template_kwargs` must be a dict .* is \[1\]"),
        ({"prompt": "Hi", "completion": None}, "`completion` must be a list"),
    ):
        with pytest.raises(DataError, match=words):
            Conversation.of_row(row)


def test_tools_and_arguments_reach_the_template() -> None:
    tokenizer = tokenizer_of(TOOLS)
    row = {"messages": TWO_TURNS, "tools": '[{"name": "clock"}]', "chat_template_kwargs": {"mood": "calm"}}
    ids, labels, _ = encoded(Conversation.of_row(row), tokenizer, None)
    assert tokenizer.decode(ids).startswith("clock;calm<|start|>system")
    assert learned({"input_ids": ids, "labels": labels}, tokenizer) == ANSWERS


def chat_rows(file: Path, n: int = 9, column: str = "messages") -> str:
    """Write conversations of one or two answers and different lengths."""
    rows = []
    for k in range(n):
        turns = [("user", "a" * (k + 1)), ("assistant", "b" * (2 + k % 5)), ("user", "c"), ("assistant", "d" * k)]
        messages = [{"role": role, "content": text} for role, text in turns[: 2 + 2 * (k % 2)]]
        rows.append({column: messages})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def answers_alone(model: nn.Module, rows: Sequence[Any]) -> Tensor:
    """Return the mean loss over the labelled tokens of rows, one row at a time."""
    total, n = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        total = total + F.cross_entropy(model(input_ids=ids).logits[0, :-1], labels[1:], reduction="sum")
        n += int((labels[1:] != -100).sum())
    return total / n


def test_the_gradient_of_answers_is_that_of_one_batch(tmp_path: Path) -> None:
    model = save_chat_model(tmp_path / "model", MARKED, torch.float64)
    loaded = load_task("chat", model, chat_rows(tmp_path / "rows.jsonl"), validation_split=0.0)
    rows, sizes = list(loaded.train), {"batch_size": 2, "effective_batch_size": 5}
    loaded.model.double()  # its buffers as well, which older Transformers multiplies by positions in float64
    with all_in_float64():
        found = accumulated_gradients(loaded.model, rows, tokenizer=loaded.tokenizer, **sizes)
        windows = windows_of(rows, **sizes)
        assert [len(window) for window in windows] == [5, 4]
        for gradient, window in zip(found, windows, strict=True):
            loaded.model.zero_grad()
            answers_alone(loaded.model, window).backward()
            wanted = {name: p.grad for name, p in loaded.model.named_parameters()}
            assert relative_error(gradient, wanted) < 1e-12


def test_the_command_trains_and_saves_the_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.jinja").write_text(MARKED)
    model = save_chat_model(tmp_path / "model", None)
    rows = chat_rows(tmp_path / "rows.jsonl", column="conversations")
    words = ["--task", "chat", "--model", model, "--train_data", rows, "--val_data", rows, "--n_epochs", "1"]
    words += ["--chat_template", str(tmp_path / "mine.jinja"), "--output_dir", str(tmp_path / "o"), "--progress", "no"]
    words += ["--metric_for_best", "token_accuracy", "--audit", "False", "--keep_checkpoints", "0"]
    assert main(["train", *words]) == 0
    assert "token_accuracy" in capsys.readouterr().out
    assert (tmp_path / "o" / "model" / "chat_template.jinja").read_text() == MARKED
    (tmp_path / "mine.jinja").unlink()  # the model has it
    assert main(["eval", str(tmp_path / "o"), "--data", rows, "--progress", "no"]) == 0
    assert "token_accuracy" in capsys.readouterr().out


def test_token_accuracy_counts_labelled_tokens_alone(tmp_path: Path) -> None:
    model = save_chat_model(tmp_path / "model")
    rows = chat_rows(tmp_path / "rows.jsonl")
    loaded = load_task("chat", model, rows, rows)
    result = test_fine_tuning(**loaded.arguments(), max_updates=1, n_epochs=1, learning_rate=1e-30, progress=False)
    right, n = 0, 0
    loaded.model.eval()
    for row in loaded.train:
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            tokens = loaded.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].argmax(-1)
        right, n = right + int((tokens == labels).sum()), n + int((labels != -100).sum())
    assert result.metrics[-1] == {"token_accuracy": pytest.approx(right / n)}


def test_rows_that_are_cut_or_have_no_answer_are_counted(tmp_path: Path) -> None:
    model, rows = save_chat_model(tmp_path / "model"), chat_rows(tmp_path / "rows.jsonl")
    with open(rows, "a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "a" * 50}]}) + "\n")
    with pytest.warns(TextWarning) as warned:
        loaded = load_task("chat", model, rows, max_length=40)
    assert [str(warning.message) for warning in warned] == [
        "In `train_data`, 5 of 10 rows (the first is row 1) are longer than 40 tokens, the limit of `max_length`, the "
        "tokenizer or the model, and are cut at the end.",
        "In `train_data`, 1 of 10 rows (the first is row 9) have no answer within 40 tokens and are skipped.",
    ]
    assert len(loaded.train) == 9
    assert max(len(row["input_ids"]) for row in loaded.train) == 40
    with pytest.raises(DataError, match="No row of `train_data` has an answer within 10 tokens"):
        load_task("chat", model, rows, max_length=10)


def test_bad_input_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    rows = chat_rows(tmp_path / "rows.jsonl", column="talk")
    options: dict[str, Any]
    for options, error, words in (
        (
            {},
            DataError,
            "no columns 'prompt' and 'completion', only 'talk'. Name the .* `--columns messages=NAME` \\(in",
        ),
        ({"chat_template": "absent.jinja"}, SettingsError, "`chat_template` 'absent.jinja' cannot be read"),
        ({"packing": True}, SettingsError, "`packing` is an option of the task 'causal-lm', but `task` is 'chat'"),
        ({"mlm_probability": 0.3}, SettingsError, "`mlm_probability` is an option of the task 'masked-lm'"),
    ):
        with pytest.raises(error, match=words):
            load_task("chat", "absent-model", rows, **options)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    model = save_chat_model(tmp_path / "model")
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertLMHeadModel(BertConfig(vocab_size=512, **tiny)).save_pretrained(model)
    with pytest.raises(SettingsError, match="is an encoder: each token sees the next ones"):
        load_task("chat", model, chat_rows(tmp_path / "rows.jsonl"))


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    model = save_chat_model(tmp_path / "model", None)
    with pytest.raises(SettingsError, match=r"has no chat template\. Choose a chat model, .* with `chat_template`"):
        load_task("chat", model, chat_rows(tmp_path / "rows.jsonl"))
