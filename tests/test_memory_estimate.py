"""The estimate of memory per process, compared with the bytes that tensors hold."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    PreTrainedModel,
    ResNetConfig,
    T5Config,
)

from ftaccum.apps.cli import main
from ftaccum.apps.memory.estimate import MemorySetup, estimate_memory, kept_of_blocks
from ftaccum.apps.memory.meta_model import model_of_config
from ftaccum.apps.memory.optimizer_states import STATES
from ftaccum.runtime.gradients.fp32 import gradient_strategy
from ftaccum.runtime.model_context import model_context
from ftaccum.settings.recipe import Recipe
from ftaccum.training.named_optimizers import NAMED, make_named
from ftaccum.training.parameter_groups import parameter_groups
from held_bytes import TINY_LLAMA, bytes_kept_for_backward, bytes_of_states, bytes_of_storages

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import memory_table

BATCH, LENGTH = 2, 32
BERT = BertConfig(
    vocab_size=64, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
GPT2 = GPT2Config(
    vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
)
MODELS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "Llama": (LlamaForCausalLM, TINY_LLAMA),
    "BERT": (BertForSequenceClassification, BERT),
    "GPT-2": (GPT2LMHeadModel, GPT2),
}


def batch_of(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 64, (BATCH, LENGTH))
    labels = torch.zeros(BATCH, dtype=torch.long) if hasattr(model, "classifier") else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("optimizer", NAMED)
def test_weights_gradients_and_optimizer_states_are_exact(optimizer: str) -> None:
    named = NAMED[optimizer]
    if "8bit" in optimizer or (named.module and importlib.util.find_spec(named.module) is None):
        pytest.skip("it needs a GPU or a package that is not installed")
    model = LlamaForCausalLM(TINY_LLAMA)
    recipe = Recipe(optimizer=optimizer)
    made = make_named(recipe, parameter_groups(model, recipe))
    if hasattr(made, "train"):  # a schedule-free one
        made.train()
    model(**batch_of(model)).loss.backward()
    made.step()
    estimate = estimate_memory(model, MemorySetup(optimizer=optimizer), sharded=False)
    assert estimate.weights == bytes_of_storages(model.parameters())
    assert estimate.buffers == bytes_of_storages(model.buffers())
    assert estimate.gradients == bytes_of_storages(p.grad for p in model.parameters())
    assert estimate.optimizer_states == bytes_of_states(made)


def test_every_named_optimizer_has_its_states() -> None:
    assert STATES.keys() == NAMED.keys()


def test_eight_bit_states_take_a_byte_and_a_share_of_a_scale_for_each_number() -> None:
    state = STATES["adamw_8bit"]
    assert state((64, 64), 4) == 2 * (4096 + 16 * 4)
    assert state((63,), 4) == 2 * 63 * 4  # small tensors stay in float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_on_the_meta_device_has_the_weights_of_a_real_one(dtype: str) -> None:
    real = LlamaForCausalLM(TINY_LLAMA).to(getattr(torch, dtype))
    meta = model_of_config(TINY_LLAMA, "causal-lm", dtype)
    assert all(p.is_meta for p in meta.parameters())
    assert {n: (p.shape, p.dtype) for n, p in meta.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in real.named_parameters()
    }


def test_sums_of_16_bit_gradients_are_exact_and_replace_gradients() -> None:
    model = LlamaForCausalLM(TINY_LLAMA).to(torch.bfloat16)
    gradients = gradient_strategy(make_named(Recipe(), parameter_groups(model, Recipe())), in_float32=True)
    with gradients.accumulating():
        gradients.begin_window()
        model(**batch_of(model)).loss.backward()
    estimate = estimate_memory(model, MemorySetup(accumulate_in_fp32=True), sharded=False)
    assert estimate.gradient_sums == bytes_of_storages(p.grad for p in gradients.parameters)
    assert estimate.gradients == bytes_of_storages(p.grad for p in model.parameters()) == 0
    assert estimate_memory(model, MemorySetup(), sharded=False).gradient_sums == 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_what_autograd_keeps_within_a_tenth(name: str, precision: str) -> None:
    kind, config = MODELS[name]
    autocast = precision == "autocast"
    model = kind(config).to(torch.bfloat16 if precision == "bfloat16" else torch.float32).train()
    estimate = estimate_memory(model, MemorySetup(tokens=BATCH * LENGTH, autocast=autocast), sharded=False)
    assert estimate.activations is not None
    log_softmax = 4 * config.vocab_size * BATCH * LENGTH if estimate.logits else 0
    kept = bytes_kept_for_backward(model, batch_of(model), autocast=autocast)
    assert kept == pytest.approx(estimate.activations + estimate.autocast_copies + log_softmax, rel=0.1)


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block() -> None:
    model = LlamaForCausalLM(TINY_LLAMA).train()
    setup = MemorySetup(tokens=BATCH * LENGTH, gradient_checkpointing=True)
    parts = kept_of_blocks(model, setup)
    estimate = estimate_memory(model, setup, sharded=False)
    assert estimate.activations == 3 * parts.boundary + parts.block + parts.head
    log_softmax = 4 * TINY_LLAMA.vocab_size * BATCH * LENGTH
    before_backward = 3 * parts.boundary + parts.head + log_softmax
    with model_context(model, gradient_checkpointing=True):
        assert bytes_kept_for_backward(model, batch_of(model)) == pytest.approx(before_backward, rel=0.1)


def test_dropout_adds_two_masks_of_one_byte_a_number() -> None:
    setup = MemorySetup(tokens=10)
    without, dropping = (
        kept_of_blocks(model_of_config(BertConfig(**{**BERT.to_dict(), "hidden_dropout_prob": p})), setup).block
        for p in (0.0, 0.1)
    )
    assert dropping - without == 2 * BERT.hidden_size * 10


def test_logits_count_as_output_log_softmax_and_gradient() -> None:
    model = model_of_config(TINY_LLAMA, "causal-lm", "bfloat16")
    assert estimate_memory(model, MemorySetup(tokens=10), sharded=False).logits == 10 * 127 * (2 + 4 + 4)
    assert estimate_memory(model_of_config(BERT), MemorySetup(tokens=10), sharded=False).logits == 0


def test_several_whole_copies_need_ddp_buckets_and_shards_need_gathered_units() -> None:
    model = model_of_config(TINY_LLAMA, "causal-lm", "float32")
    alone, copies = (estimate_memory(model, MemorySetup(num_processes=n), sharded=False) for n in (1, 8))
    assert (alone.ddp_buckets, copies.ddp_buckets) == (0, copies.gradients)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    root = model.num_parameters() - 3 * block
    shards = estimate_memory(model, MemorySetup(num_processes=8), sharded=True)
    assert shards.gathered_weights == 4 * (root + 2 * block)
    assert shards.whole_gradients == 8 * max(root, block)
    autocast = estimate_memory(model, MemorySetup(num_processes=8, autocast=True), sharded=True)
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    assert autocast.autocast_copies == 0  # made again in the backward pass
    whole = estimate_memory(model, MemorySetup(num_processes=8, autocast=True), sharded=False)
    assert whole.autocast_copies == 2 * linear
    late = estimate_memory(model, MemorySetup(num_processes=8, sync="last"), sharded=True)
    assert late.whole_gradients - shards.whole_gradients == 4 * model.num_parameters()


UNKNOWN = {
    "encoder and a decoder": T5Config(num_layers=1, d_model=8, d_ff=16, num_heads=2, d_kv=4, vocab_size=16),
    "mixture of experts": MixtralConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=2, vocab_size=16,
    ),
    "tokens × tokens": DebertaV2Config(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16
    ),
    "several kinds": ResNetConfig(hidden_sizes=[8], depths=[1], embedding_size=8),
}  # fmt: skip


@pytest.mark.parametrize("reason", UNKNOWN)
def test_activations_of_other_models_are_unknown_with_the_reason(reason: str) -> None:
    model = model_of_config(UNKNOWN[reason])
    estimate = estimate_memory(model, MemorySetup(), sharded=False)
    assert estimate.activations is None
    known = (estimate.weights, estimate.buffers, estimate.gradients, estimate.optimizer_states, estimate.logits)
    assert estimate.total == sum(known)
    with pytest.raises(ValueError, match=reason):
        kept_of_blocks(model, MemorySetup())


def test_the_command_needs_only_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TINY_LLAMA.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["plan", "--n_rows", "100", "--model", str(tmp_path), "--num_processes", "2"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "Updates per epoch:" in shown
    assert "LlamaForCausalLM with 26,464 weights in bfloat16, adamw, micro-batches of 4 × 64 tokens" in shown
    assert "FSDP2 over 2" in shown
    assert "not yet checked on a GPU" in shown
    assert main([*words, "--task", "text-classification", "--max_length", "16", "--dtype", "float32"]) == 0
    assert "LlamaForSequenceClassification with 26,528 weights in float32" in capsys.readouterr().out


def test_bad_input_gets_one_error_and_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, sentence in (
        (["--model", str(tmp_path / "absent")], "has no config that can be loaded: there is no such folder. Give a"),
        (["--model", str(tmp_path)], "has no config that can be loaded"),
        (["--dtype", "bfloat16"], "`dtype` is given, but `model` is None"),
        (["--model", "x", "--dtype", "int8"], "`dtype` must be 'auto', 'float32'"),
    ):
        assert main(["plan", *words]) == 2
        shown = capsys.readouterr()
        assert sentence in shown.err
        assert len(shown.err.splitlines()) == 1
        assert shown.out == ""


@pytest.mark.slow
def test_shards_are_exact_on_the_fullest_of_two_processes(two_processes: Callable[..., str]) -> None:
    printed = two_processes("memory_of_two.py")
    found = json.loads(printed.partition("FOUND ")[2].splitlines()[0])
    for dtype in ("float32", "bfloat16"):
        fullest = {name: max(held[dtype][name] for held in found) for name in found[0][dtype]}
        meta = model_of_config(TINY_LLAMA, "causal-lm", dtype)
        estimate = estimate_memory(meta, MemorySetup(num_processes=2), sharded=True)
        assert fullest == {name: getattr(estimate, name) for name in fullest}


@pytest.mark.slow
def test_the_docs_show_the_table_that_the_script_prints() -> None:
    page = (Path(__file__).parents[1] / "docs" / "launching.md").read_text(encoding="utf-8")
    assert "\n".join(memory_table.table()) in page
