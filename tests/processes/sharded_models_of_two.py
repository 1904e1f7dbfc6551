"""Save sharded models on two processes, and print how each folder differs from that of the same model without shards.

The argument is the folder to write to.
"""

import importlib
import json
import resource
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import ftaccum.runtime.sharding.whole_weights as whole_weights
from ftaccum import SettingsError
from ftaccum.runtime.process_group import ProcessGroup
from ftaccum.runtime.run_dir import RunDir
from ftaccum.tracking.export import write_model
from ftaccum.tracking.model_files import save_model, save_on_main
from ftaccum.tracking.trained_model import TrainedModel
from heads import HEADS

state, folder = PartialState(cpu=True), Path(sys.argv[1])
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)
group = ProcessGroup(2)
SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 61}
IDS = torch.arange(1, 7)[None]


class Plain(nn.Module):
    """A module with tied weights, a buffer and a weight that is smaller than the number of processes."""

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(61, 8), nn.Linear(8, 8)
        self.one = nn.Parameter(torch.ones(1))
        self.out = nn.Linear(8, 61, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("counts", torch.arange(5))
        self.register_buffer("hidden", torch.ones(2), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.layer(self.embed(input_ids)) * self.one)


def with_adapters(**options: Any) -> nn.Module:
    config = BertConfig(num_labels=3, **SIZE)
    return peft.get_peft_model(BertForSequenceClassification(config).bfloat16(), peft.LoraConfig(r=2, **options))


def with_two_adapters() -> nn.Module:
    """Return a model with a second adapter that is not trained, and one on its embeddings, which PEFT saves as well."""
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "v_proj"])
    model = peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZE)), config)
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj"]))
    return model


def with_prompts() -> nn.Module:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZE)), config)


def with_own_code() -> nn.Module:
    sys.path.insert(0, str(folder))
    own_code = importlib.import_module("own_code")  # the test has written it
    own_code.OwnModel.register_for_auto_class("AutoModelForCausalLM")
    return own_code.OwnModel(LlamaConfig(**SIZE))


def with_refused_settings() -> nn.Module:
    model = LlamaForCausalLM(LlamaConfig(**SIZE))
    model.generation_config.update(do_sample=False, temperature=0.7)
    return model


def tied_in_bf16() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=True)).bfloat16()


MODELS: dict[str, Callable[[], Any]] = {
    **{name: HEADS[name].model for name in ("causal LM, GPT-2", "seq2seq, T5", "causal LM, Llama")},
    "sequence classification, BERT": HEADS["sequence classification, BERT"].model,
    "tied Llama in bf16": tied_in_bf16,
    "Mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_local_experts=4, num_key_value_heads=2, **SIZE)),
    "plain module": Plain,
    "LoRA with a head": lambda: with_adapters(target_modules=["query"], modules_to_save=["classifier"]),
    "two adapters, one on embeddings": with_two_adapters,
    "prompt tuning": with_prompts,
    "own code": with_own_code,
    "settings that Transformers refuses": with_refused_settings,
}


def made(name: str) -> nn.Module:
    """Return the same model each time, with random weights."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for p in {id(p): p for p in model.parameters()}.values():
        nn.init.normal_(p)
    return model


def sharded(model: nn.Module) -> nn.Module:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inner = {module for each in lists for module in each.modules() if module is not each}
    for block in (block for each in lists if each not in inner for block in each):
        if not {id(p) for p in block.parameters()} & {id(p) for p in outside(model, block)}:
            fully_shard(block)
    return fully_shard(model)


def outside(model: nn.Module, block: nn.Module) -> list[Tensor]:
    inside = set(block.modules())
    return [
        p for module in model.modules() if module not in inside for p in module._parameters.values() if p is not None
    ]


def contents(saved: Path) -> dict[str, bytes]:
    return {str(path.relative_to(saved)): path.read_bytes() for path in saved.rglob("*") if path.is_file()}


def local_bits(model: nn.Module) -> dict[str, tuple[int, type, Tensor]]:
    return {
        name: (id(p), type(p), p.to_local().clone() if isinstance(p, DTensor) else p.detach().clone())
        for name, p in model.named_parameters(remove_duplicate=False)
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        one[n][:2] == other[n][:2] and torch.equal(one[n][2], other[n][2]) for n in one
    )


alive: list[weakref.ref[Tensor]] = []
n_alive: list[int] = []
whole_tensor = whole_weights.whole_tensor


def counted(tensor: Tensor) -> Tensor:
    n_alive.append(sum(each() is not None for each in alive))
    whole = whole_tensor(tensor)
    alive.append(weakref.ref(whole))
    return whole


def compared(name: str) -> dict[str, Any]:
    """Save a model without shards and with them, and return what is found."""
    if state.is_main_process:
        save_model(made(name), None, folder / name / "expected")
    model = sharded(made(name))
    before, classes, n_gathered = local_bits(model), [type(module) for module in model.modules()], len(n_alive)
    with torch.no_grad():
        model(input_ids=IDS, **({"decoder_input_ids": IDS} if "T5" in name else {}))  # leaves the outermost unit whole
    run_dir = RunDir(folder / name)
    unwritten = write_model(TrainedModel(model, None, "adapter"), run_dir, group)
    one, other = contents(folder / name / "expected"), contents(run_dir.model)
    return {
        "unwritten": unwritten,
        "files": [sorted(one), sorted(other)],
        "different": sorted(file for file in one.keys() & other.keys() if one[file] != other[file]),
        "restored": same(before, local_bits(model)) and classes == [type(module) for module in model.modules()],
        "gathered": len(n_alive) - n_gathered,
        "sharded": sum(isinstance(p, DTensor) for p in model.parameters()),
        "left": sorted(path.name for path in run_dir.path.iterdir()),
    }


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """Let the main process write no larger file, as if its disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if state.is_main_process:
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def on_a_full_disk() -> dict[str, Any]:
    """Save a model where there is no room for it, and return the sentences about it."""
    model, run_dir = sharded(made("causal LM, Llama")), RunDir(folder / "full")
    before, trained, sentences = local_bits(model), TrainedModel(model, None, "adapter"), {}
    for n_bytes in (0, 10_000):
        with largest_file(n_bytes):
            sentences[f"at most {n_bytes} bytes"] = write_model(trained, run_dir, group)
    (folder / "file").touch()
    sentences["no folder"] = write_model(trained, RunDir(folder / "file" / "run"), group)
    with patch("ftaccum.tracking.export.save_model", side_effect=OSError(28, "No space left on device")):
        sentences["while saving"] = write_model(trained, run_dir, group)
    written = write_model(trained, run_dir, group)
    return {
        "sentences": sentences,
        "restored": same(before, local_bits(model)),
        "written": written,
        "left": sorted(path.name for path in run_dir.path.iterdir()),
    }


def of_a_result() -> dict[str, str]:
    """Save a model as a result does, and return the errors: of a full disk, and of merging."""
    model, errors = sharded(made("LoRA with a head")), {}
    save_on_main(model, None, folder / "saved", merges=False)
    with largest_file(100):
        try:
            save_on_main(model, None, folder / "not saved", merges=False)
        except OSError as error:
            errors["full"] = str(error)
    try:
        save_on_main(model, None, folder / "merged", merges=True)
    except SettingsError as error:
        errors["merged"] = str(error)
    return errors


whole_weights.whole_tensor = counted
found = {
    "compared": {name: gather_object([compared(name)]) for name in MODELS},
    "full": gather_object([on_a_full_disk()]),
    "errors": gather_object([of_a_result()]),
    "most alive": max(n_alive) + 1,
}
if state.is_main_process:
    print("FOUND", json.dumps(found))
state.wait_for_everyone()
