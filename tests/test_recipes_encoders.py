"""The recipes for tokens, questions, choices, masked tokens and images: they train and save models that load."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    pipeline,
)

from recipe_runs import run_recipe
from silent_errors.text_columns import word_tokenizer
from task_files import TEXTS, needs_image_processor, piece_tokenizer, save_encoder, save_rows


def token_classification_words(folder: Path) -> list[str]:
    rows = [{"tokens": text.split(), "tags": ["noun" if w in ("film", "plot") else "other" for w in text.split()]}
            for text in TEXTS]  # fmt: skip
    return _words(folder, save_encoder(folder / "model"), rows)


def question_answering_words(folder: Path) -> list[str]:
    model = save_encoder(folder / "model", piece_tokenizer(), vocab_size=32)
    texts = [("Ann lives in New York", "New York"), ("Bo lives in the old city", "the old city")] * 4
    rows = [
        {"question": "where ?", "context": text, "answers": {"text": [answer], "answer_start": [text.index(answer)]}}
        for text, answer in texts
    ]
    return _words(folder, model, rows)


def multiple_choice_words(folder: Path) -> list[str]:
    choices = ["ann", "the old city", "york"]
    texts = ["who lives in new york", "where", "the big city was old"] * 3
    rows = [{"meaning": text, "choices": choices, "answer": choices[n % 3]} for n, text in enumerate(texts)]
    columns = ["--columns", "context=meaning,label=answer"]
    return [*_words(folder, save_encoder(folder / "model", piece_tokenizer(), vocab_size=32), rows), *columns]


def masked_lm_words(folder: Path) -> list[str]:
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    model = save_encoder(folder / "model", tokenizer, vocab_size=len(tokenizer))
    return _words(folder, model, [{"text": text} for text in TEXTS])


def image_classification_words(folder: Path) -> list[str]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(image_size=4, patch_size=2, **sizes), add_pooling_layer=False).save_pretrained(folder / "model")
    ViTImageProcessor(size={"height": 4, "width": 4}).save_pretrained(folder / "model")
    for n in range(8):
        file = folder / "images" / ("dark", "light")[n % 2] / f"{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 5), 128 * (n % 2) + n, dtype="uint8")).save(file)
    return ["--model", str(folder / "model"), "--train_data", str(folder / "images")]


def _words(folder: Path, model: str, rows: list[dict]) -> list[str]:
    return ["--model", model, "--train_data", save_rows(folder / "rows.jsonl", rows)]


def _train(name: str, words: list[str], folder: Path) -> str:
    """Train for two updates, and return the folder of the saved model."""
    settings = ["--batch_size", "2", "--effective_batch_size", "3", "--max_updates", "2", "--validation_split", "0.25"]
    assert run_recipe(name, *words, *settings, "--progress", "no", "--output_dir", str(folder / "out")) == 0
    return str(folder / "out" / "model")


def test_token_classification(tmp_path: Path) -> None:
    model = _train("token_classification", token_classification_words(tmp_path), tmp_path)
    found = pipeline("token-classification", model)("a film")
    assert [each["word"] for each in found] == ["a", "film"]
    assert {each["entity"] for each in found} <= {"noun", "other"}


def test_question_answering(tmp_path: Path) -> None:
    model = _train("question_answering", question_answering_words(tmp_path), tmp_path)
    tokens = AutoTokenizer.from_pretrained(model)("where ?", "Ann lives in New York", return_tensors="pt")
    assert AutoModelForQuestionAnswering.from_pretrained(model)(**tokens).start_logits.shape == (1, len(tokens[0]))


def test_multiple_choice(tmp_path: Path) -> None:
    model = _train("multiple_choice", multiple_choice_words(tmp_path), tmp_path)
    tokens = AutoTokenizer.from_pretrained(model)(["where"] * 2, ["ann", "york"], padding=True, return_tensors="pt")
    rows = {name: values[None] for name, values in tokens.items()}
    assert AutoModelForMultipleChoice.from_pretrained(model)(**rows).logits.shape == (1, 2)


def test_masked_lm(tmp_path: Path) -> None:
    model = _train("masked_lm", masked_lm_words(tmp_path), tmp_path)
    assert len(pipeline("fill-mask", model)("a good [MASK]", top_k=2)) == 2


@needs_image_processor
def test_image_classification(tmp_path: Path) -> None:
    model = _train("image_classification", image_classification_words(tmp_path), tmp_path)
    found = pipeline("image-classification", model)(Image.new("RGB", (9, 7)))
    assert {each["label"] for each in found} == {"dark", "light"}
