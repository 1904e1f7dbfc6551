"""Adapters on weights of 4 and 8 bits."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ftaccum import SettingsError, test_fine_tuning
from ftaccum.tasks.quantization import faults_of_quantization, quantization_config
from heads import HEADS, one_batch

ROWS = HEADS["causal LM, Llama"].rows()
CONFIG = LlamaConfig(
    vocab_size=61, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, pad_token_id=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("four", "eight", "has_adapters", "sentences"),
    [
        (False, False, False, []),
        (True, True, True, ["`load_in_4bit` and `load_in_8bit` are both True. Choose one of them."]),
        (True, False, False, ["`load_in_4bit` is True, but weights of so few bits cannot be trained. Train adapters"]),
        (False, True, False, ["`load_in_8bit` is True, but weights of so few bits cannot be trained. Train adapters"]),
    ],
)
def test_faults_are_found_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, four: bool, eight: bool, has_adapters: bool, sentences: list[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: True if name == "bitsandbytes" else find(name, *a))
    found = faults_of_quantization(load_in_4bit=four, load_in_8bit=eight, has_adapters=has_adapters)
    assert [fault[: len(wanted)] for fault, wanted in zip(found, sentences, strict=True)] == sentences


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a))
    with pytest.raises(SettingsError, match=r"`load_in_4bit` needs the package `bitsandbytes`, which .* `pip inst"):
        quantization_config(load_in_4bit=True, load_in_8bit=False)


def test_a_missing_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(functional, "quantize_4bit", fail)
    with pytest.raises(SettingsError, match=r"bitsandbytes cannot quantize .*: RuntimeError: no kernel for this"):
        quantization_config(load_in_4bit=True, load_in_8bit=False)


def quantized(folder: Path, bits: int) -> Any:
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        LlamaForCausalLM(CONFIG).save_pretrained(folder)
    config = quantization_config(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def run(model: Any, **arguments: Any) -> Any:
    defaults: dict[str, Any] = {"batch_size": 2, "effective_batch_size": 5, "n_epochs": 1, "validation_split": 0.0}
    return test_fine_tuning(model, train_data=ROWS, learning_rate=1e-2, progress=False, **defaults | arguments)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_on_few_bits_are_trained_exactly_and_loaded_again(bits: int, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    base = tmp_path / "base"
    frozen = {name: p.clone() for name, p in quantized(base, bits).named_parameters()}
    model = quantized(base, bits)
    result = run(model, lora={"r": 4}, output_dir=str(tmp_path / "run"), gradient_checkpointing=True)
    assert result.audits
    assert all(audit["error"] < 1e-5 for audit in result.audits)
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora" not in name}
    assert after.keys() == frozen.keys()
    assert all(torch.equal(p, frozen[name]) for name, p in after.items())
    loaded = peft.PeftModel.from_pretrained(quantized(base, bits), tmp_path / "run" / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**one_batch(ROWS)).logits, result.model.eval()(**one_batch(ROWS)).logits)


@pytest.mark.slow
def test_weights_of_few_bits_are_neither_trained_nor_merged(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(SettingsError, match=r"`model` has weights of 4 bits, which cannot be trained. Train adapters"):
        run(quantized(tmp_path, 4))
    with pytest.raises(SettingsError, match="`save` is 'merged', but the model has weights of 4 bits, and merging"):
        run(quantized(tmp_path, 4), lora=True, save="merged")
