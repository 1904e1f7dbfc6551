"""The chat recipe: labels of a conversation, conversion of raw conversations, and a complete run."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

from ftaccum import DataError, Result, SettingsError

RECIPES = Path(__file__).parent.parent / "recipes"

PLAIN = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}"
)
NO_END_TOKEN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FORGETS_THOUGHTS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}(thinks) {% endif %}{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
REFUSES = "{{ raise_exception('roles must alternate') }}"

TWO_TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me.\nAnd you 🦜?"},
    {"role": "user", "content": "You."},
    {"role": "assistant", "content": "Fine."},
]


@pytest.fixture(autouse=True)
def _recipes_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(RECIPES), *sys.path])


@pytest.fixture
def recipe() -> ModuleType:
    import causal_lm

    return causal_lm


@pytest.fixture
def encoded() -> Callable[..., dict[str, list[int]]]:
    from ftaccum.tasks import chat_tokens as chat

    return chat.encoded


def tokenizer_with(template: str | None, *merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each byte, so that labels can be checked by character, and two for turns."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])
    special = {"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)


def learned(row: dict[str, list[int]], tokenizer: Any) -> list[str]:
    """Return the parts of a row that have labels, as text."""
    stretches: list[list[int]] = [[]]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (token, -100)
        if label != -100:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_answers_and_their_end_of_turn_have_labels(encoded: Any, template: str) -> None:
    tokenizer = tokenizer_with(template)
    row = encoded(TWO_TURNS, tokenizer, 1000)
    assert learned(row, tokenizer) == ["Me.\nAnd you 🦜?<|end|>", "Fine.<|end|>"]
    assert row["input_ids"] == tokenizer.apply_chat_template(TWO_TURNS, return_dict=False)


def test_text_after_an_answer_has_labels_if_no_token_ends_a_turn(encoded: Any) -> None:
    tokenizer = tokenizer_with(NO_END_TOKEN)
    assert learned(encoded(TWO_TURNS, tokenizer, 1000), tokenizer) == ["Me.\nAnd you 🦜?\n", "Fine.\n"]


def test_a_token_that_spans_prompt_and_answer_belongs_to_the_answer(encoded: Any) -> None:
    tokenizer = tokenizer_with(NO_END_TOKEN, ("Ġ", "F"))  # the prompt's last space and the answer's first letter
    assert learned(encoded(TWO_TURNS, tokenizer, 1000), tokenizer)[-1] == " Fine.\n"


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_long_conversations_are_truncated_at_the_end(encoded: Any, template: str) -> None:
    tokenizer = tokenizer_with(template)
    whole = encoded(TWO_TURNS, tokenizer, 1000)
    first_answer = next(n for n, label in enumerate(whole["labels"]) if label != -100)
    for length, stretches in ((first_answer + 2, ["Me"]), (first_answer, [])):
        row = encoded(TWO_TURNS, tokenizer, length)
        assert row == {name: column[:length] for name, column in whole.items()}
        assert learned(row, tokenizer) == stretches


def test_messages_that_the_template_cannot_format_are_refused(encoded: Any) -> None:
    for template, messages, words in (
        (FORGETS_THOUGHTS, TWO_TURNS, "formats the messages before message 2 differently if more follow"),
        (REFUSES, TWO_TURNS, "cannot format these messages: roles must alternate"),
        (PLAIN, TWO_TURNS[2:], "The first message has the role 'assistant'"),
        (PLAIN, [], r"must be a list such as .* but are \[\] instead"),
        (PLAIN, "Hello", "but are 'Hello' instead"),
    ):
        with pytest.raises(DataError, match=words):
            encoded(messages, tokenizer_with(template), 1000)
    one_answer = encoded(TWO_TURNS[:3], tokenizer_with(PLAIN), 1000)
    assert learned(one_answer, tokenizer_with(PLAIN)) == ["Me.\nAnd you 🦜?<|end|>"]


def raw(*turns: str) -> dict[str, Any]:
    """Return a conversation in the form of the data package. A turn is "author: line / line"."""
    parted = [turn.split(": ", 1) for turn in turns]
    return {"messages": [[{"sender": who, "text": text} for text in lines.split("/")] for who, lines in parted]}


def test_consecutive_texts_of_one_author_are_one_message() -> None:
    import packaged

    def contents(*turns: str) -> list[str]:
        messages = packaged.as_messages(raw(*turns))
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        return [m["content"] for m in messages]

    assert contents("a: Hi / how are you", "b: fine", "a: good", "b: bye") == ["Hi\nhow are you", "fine", "good", "bye"]
    assert contents("a: Hi", "a: there", "b: yes") == ["Hi\nthere", "yes"]
    assert contents("a: Hi", "b:  / ", "a: there", "b: yes /  / you") == ["Hi\nthere", "yes\nyou"]
    assert contents("a:  ", "b: Hi", "a: hello") == ["Hi", "hello"]
    assert contents("a: Hi", "b: yes", "a: anyone?") == ["Hi", "yes"]
    assert contents("a: Hi") == contents() == []


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Save a tiny Llama and a byte tokenizer in a folder."""
    tokenizer = tokenizer_with(PLAIN)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "chat-model")
    tokenizer.save_pretrained(tmp_path / "chat-model")
    return str(tmp_path / "chat-model")


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
    words = ["--model", model, "--train_data", train, "--val_data", val, "--messages_column", "talk"]
    words += ["--max_length", "80", "--max_val_rows", "4", "--n_epochs", "2", "--learning_rate", "1e-2"]
    words += ["--batch_size", "2", "--effective_batch_size", "6", "--progress", "no"]
    words += ["--output_dir", str(tmp_path / "o")]
    recipe.main(words)
    shown = capfd.readouterr().out
    assert "1 of 18 rows of `train_data` have no answer within 80 tokens and are skipped." in shown
    assert "rows of `val_data`" not in shown
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
    spoiled.write_text(Path(rows).read_text() + '{"messages": [{"role": "assistant", "content": "Hello"}]}\n')
    mute = str(tmp_path / "mute")
    tokenizer_with(None).save_pretrained(mute)
    LlamaForCausalLM.from_pretrained(model).save_pretrained(mute)
    for words, error, sentence in (
        (["--max_length", "0"], SettingsError, "`max_length` must be a positive integer or None, but is 0 instead"),
        (["--n_epochs", "0"], SettingsError, "`n_epochs` must be a positive integer"),
        (["--max_length", "129"], SettingsError, "`max_length` must be at most 128, the model's limit"),
        (["--max_length", "10"], DataError, "6 of 6 rows of `train_data` have no answer within 10 tokens. Raise"),
        (["--train_data", str(spoiled)], DataError, "Row 6 of `train_data`: The first message has the role"),
        (["--messages_column", "talk"], DataError, "have no column 'talk'"),
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


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Record the names of the functions that `packaged` would call to prepare files."""
    import packaged

    calls: list[str] = []
    for name, path in (("SMOLLM", "model"), ("CHATS_TRAIN", "train.jsonl"), ("CHATS_VAL", "val.jsonl")):
        monkeypatch.setattr(packaged, name, tmp_path / path)
    for name in ("prepare_smollm", "prepare_chats"):
        monkeypatch.setattr(packaged, name, lambda name=name: calls.append(name))
    return calls


def test_only_files_that_are_named_and_missing_are_prepared(made: list[str]) -> None:
    import packaged

    packaged.prepare_named("org/model", "rows.jsonl", None)
    assert made == []
    packaged.prepare_named("org/model", str(packaged.CHATS_TRAIN), str(packaged.CHATS_VAL))
    assert made == ["prepare_chats"]
    packaged.CHATS_TRAIN.touch()
    packaged.CHATS_VAL.touch()
    packaged.prepare_named(str(packaged.SMOLLM), str(packaged.CHATS_TRAIN), str(packaged.CHATS_VAL))
    assert made == ["prepare_chats", "prepare_smollm"]
