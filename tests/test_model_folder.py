"""The folder of a trained model: complete, so that `pipeline` loads it, whatever its settings are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)

from ftaccum import Result, test_fine_tuning
from ftaccum.runtime.log import run_logging
from ftaccum.tracking.model_files import save_model

WORDS = ["[PAD]", "[UNK]", "</s>", "user", "assistant", "good", "bad", "film", "Anna", "in", "Berlin"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXTS = {"text": ["good film", "bad film"]}


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=16, chat_template=TEMPLATE, **special)


def labels(*names: str) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), bos_token_id=None, eos_token_id=2, **SMALL))


def train(folder: Path, model: nn.Module, rows: Any, tokenizer: Any) -> Result:
    """Train one update, and return the result of a run whose files could all be written."""
    result = test_fine_tuning(
        model, train_data=rows, tokenizer=tokenizer, output_dir=str(folder), validation_split=0.0, max_updates=1,
        batch_size=2, audit=False, verbosity="quiet", checkpoint_every=None, keep_checkpoints=0,
    )  # fmt: skip
    assert result.unwritten == []
    return result


def test_a_text_classifier_loads_with_its_label_names(tmp_path: Path) -> None:
    model = BertForSequenceClassification(BertConfig(vocab_size=len(WORDS), **labels("bad", "good"), **SMALL))
    train(tmp_path, model, TEXTS | {"label": [1, 0]}, tokenizer())
    loaded = pipeline("text-classification", model=str(tmp_path / "model"), top_k=None)
    assert {each["label"] for each in loaded("good film")[0]} == {"bad", "good"}
    inputs = tokenizer()("good film", return_tensors="pt")
    scores = model.eval()(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits.softmax(-1)[0]
    assert {each["label"]: each["score"] for each in loaded("good film")[0]} == pytest.approx(
        {"bad": scores[0].item(), "good": scores[1].item()}, rel=1e-5
    )


def test_a_causal_lm_loads_with_its_chat_template_and_generation_settings(tmp_path: Path) -> None:
    model = llama()
    model.generation_config.max_new_tokens = 3  # changed in memory
    train(tmp_path, model, TEXTS, tokenizer())
    loaded = pipeline("text-generation", model=str(tmp_path / "model"))
    assert loaded.tokenizer.chat_template == TEMPLATE
    assert loaded.model.generation_config.max_new_tokens == 3
    assert loaded.model.generation_config.eos_token_id == 2
    turns = loaded([{"role": "user", "content": "good film"}])[0]["generated_text"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"]


def test_a_token_classifier_loads_with_its_label_names(tmp_path: Path) -> None:
    model = BertForTokenClassification(BertConfig(vocab_size=len(WORDS), **labels("O", "PER", "LOC"), **SMALL))
    rows = [{"input_ids": tokenizer()("Anna in Berlin")["input_ids"], "labels": [1, 0, 2]}] * 2
    train(tmp_path, model, rows, tokenizer())
    loaded = pipeline("token-classification", model=str(tmp_path / "model"), ignore_labels=[])
    found = loaded("Anna in Berlin")
    assert [each["word"] for each in found] == ["Anna", "in", "Berlin"]
    assert {each["entity"] for each in found} <= {"O", "PER", "LOC"}


def test_an_image_classifier_loads_with_its_image_processor(tmp_path: Path) -> None:
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    image = Image.fromarray(np.zeros((20, 20, 3), dtype="uint8"))
    pixels = processor(image, return_tensors="pt")["pixel_values"][0]
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **labels("cat", "dog"), **SMALL))
    train(tmp_path, model, [{"pixel_values": pixels, "labels": n} for n in (0, 1)], processor)
    loaded = pipeline("image-classification", model=str(tmp_path / "model"))
    assert {each["label"] for each in loaded(image)} == {"cat", "dog"}
    assert loaded.image_processor.size["height"] == 8


def test_a_model_in_16_bits_loads_in_16_bits(tmp_path: Path) -> None:
    save_model(llama().bfloat16(), tokenizer(), tmp_path / "model")
    assert pipeline("text-generation", model=str(tmp_path / "model")).model.dtype == torch.bfloat16


def test_the_folder_of_adapters_has_the_tokenizer_and_the_generation_settings(tmp_path: Path) -> None:
    save_model(llama(), tokenizer(), tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.generation_config.max_new_tokens = 3
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    train(tmp_path, adapted, TEXTS, tokenizer())
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "model").chat_template == TEMPLATE
    assert GenerationConfig.from_pretrained(tmp_path / "model").max_new_tokens == 3
    assert pipeline("text-generation", model=str(tmp_path / "model"))("good")[0]["generated_text"]


@pytest.mark.parametrize(
    ("changes", "kept", "said"),
    [
        ({"temperature": 0.3, "max_new_tokens": 7}, {"temperature": 0.3, "max_new_tokens": 7}, "saved as they are"),
        (
            {"num_return_sequences": 3, "max_new_tokens": 7},  # impossible without sampling
            {"num_return_sequences": None, "max_new_tokens": 7},
            "could not load them, so generation_config.json does not have {'num_return_sequences': 3}.",
        ),
        ({"max_new_tokens": -7, "top_k": 5}, {"max_new_tokens": None, "top_k": 5}, "does not have {'max_new_tokens'"),
        (
            {"num_return_sequences": 3, "max_new_tokens": -7},
            {"num_return_sequences": None, "max_new_tokens": None},
            "does not have {",
        ),
        ({"mine": {1}, "max_new_tokens": 7}, {"max_new_tokens": 7}, "does not have {'mine': {1}}"),  # not JSON
    ],
)
def test_invalid_generation_settings_cost_no_model(
    changes: dict[str, Any], kept: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = llama()
    vars(model.generation_config).update(changes)
    own = vars(model.generation_config).copy()
    with run_logging(enabled=True):
        save_model(model, tokenizer(), tmp_path / "model")
    shown = capsys.readouterr().err
    assert shown.count("Transformers finds settings in `model.generation_config` invalid (") == 1
    assert said in shown
    assert vars(model.generation_config) == own
    loaded = pipeline("text-generation", model=str(tmp_path / "model")).model
    assert {name: getattr(loaded.generation_config, name) for name in kept} == kept
    weights = loaded.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_generation_settings_in_the_config_are_saved_where_they_belong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(WORDS), **small))
    model.config.num_beams = 4
    with run_logging(enabled=True):
        save_model(model, tokenizer(), tmp_path / "model")
    assert capsys.readouterr().err.endswith(
        "`model.config` has settings for generation, which Transformers does not save there: {'num_beams': 4}. They "
        "are saved in generation_config.json instead.\n"
    )
    assert model.config.num_beams == 4
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert loaded.generation_config.num_beams == 4
    assert not hasattr(loaded.config, "num_beams")


def test_other_errors_of_a_model_that_generates_are_not_hidden(tmp_path: Path) -> None:
    model = llama()

    def fails(_: Path) -> None:
        raise ValueError("not made to be saved")

    model.save_pretrained = fails
    with pytest.raises(ValueError, match="not made to be saved"):
        save_model(model, None, tmp_path / "model")


def test_a_tokenizer_that_cannot_be_saved_costs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_logging(enabled=True):
        save_model(llama(), object(), tmp_path / "model")
    assert "`tokenizer` (object) has no `save_pretrained`, so it is not saved." in capsys.readouterr().err
    assert (tmp_path / "model" / "model.safetensors").exists()
