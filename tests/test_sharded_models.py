"""The folder of a sharded model: the same as that of the whole model, without the whole model in memory."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

from ftaccum.runtime.adapters import saved_by_peft
from ftaccum.runtime.process_group import ProcessGroup
from ftaccum.runtime.sharding.scratch_file import ScratchFile
from ftaccum.runtime.sharding.whole_weights import whole_weights
from ftaccum.tracking.model_files import save_on_main

SIZE = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 11}
OWN_CODE = """from transformers import LlamaForCausalLM


class OwnModel(LlamaForCausalLM):
    pass
"""


@pytest.fixture
def single_process() -> Iterator[None]:
    """Open a group of one process, over which weights can be sharded as well."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZE))


def test_a_scratch_file_returns_tensors_of_every_type(tmp_path: Path) -> None:
    types = (torch.bool, torch.uint8, torch.bfloat16, torch.float16, torch.int64, torch.float64, torch.complex64)
    tensors = [torch.arange(n + 1).to(dtype) for n, dtype in enumerate((*types, torch.float8_e4m3fn))]
    tensors += [torch.tensor(3.5), torch.empty(0, 4), torch.arange(6.0).view(2, 3).T, nn.Parameter(torch.ones(2))]
    file = ScratchFile(tmp_path / "new")
    for tensor in tensors:
        file.append(tensor)
    read = file.tensors()
    file.close()
    assert not any((tmp_path / "new").iterdir()), "the file has no name"
    for tensor, found in zip(tensors, read, strict=True):
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found.float() if found.dtype.itemsize == 1 else found, _comparable(tensor))
    assert len({t.untyped_storage().data_ptr() for t in read if t.numel()}) == len(tensors) - 1, "none are tied"
    read[5].zero_()  # in memory only


def _comparable(tensor: Tensor) -> Tensor:
    return (tensor.float() if tensor.dtype.itemsize == 1 else tensor).detach()


def test_a_scratch_file_of_empty_tensors_is_read(tmp_path: Path) -> None:
    file = ScratchFile(tmp_path)
    file.append(torch.empty(0, 2))
    assert [t.shape for t in file.tensors()] == [(0, 2)]
    file.close()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # of older versions of PEFT
def test_weights_that_peft_saves_are_named() -> None:
    config = peft.LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(llama(), config)
    model.add_adapter("second", peft.LoraConfig(r=1, target_modules=["q_proj"]))  # not trained, but saved
    names = {name.removeprefix("base_model.model.").removeprefix("model.layers.0.") for name in saved_by_peft(model)}
    assert names == {
        "self_attn.v_proj.lora_A.default.weight", "self_attn.v_proj.lora_B.default.weight",
        "self_attn.q_proj.lora_A.second.weight", "self_attn.q_proj.lora_B.second.weight",
        "lm_head.modules_to_save.default.weight",
    }  # fmt: skip


@pytest.mark.usefixtures("single_process")
def test_weights_are_whole_only_while_they_are_saved(tmp_path: Path) -> None:
    whole = llama()
    expected = {name: p.detach().clone() for name, p in whole.named_parameters()}
    model = fully_shard(whole)
    sharded = dict(model.named_parameters())
    with whole_weights(model, tmp_path, ProcessGroup(1)) as weights:
        with weights.in_model():
            assert type(model) is LlamaForCausalLM
            found = dict(model.named_parameters())
            assert all(type(p) is nn.Parameter and torch.equal(p, expected[name]) for name, p in found.items())
        with pytest.raises(ZeroDivisionError), weights.in_model():
            raise ZeroDivisionError
    assert type(model).__name__ == "FSDPLlamaForCausalLM"
    assert all(p is sharded[name] and isinstance(p, DTensor) for name, p in model.named_parameters())


@pytest.mark.usefixtures("single_process")
def test_a_sharded_model_is_saved_with_its_own_class(tmp_path: Path) -> None:
    model = fully_shard(llama())
    save_on_main(model, None, tmp_path / "model", merges=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(loaded) is LlamaForCausalLM
    for name, p in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), p.full_tensor())


@pytest.mark.slow
@pytest.mark.processes
def test_sharded_models_on_two_processes(two_processes: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "own_code.py").write_text(OWN_CODE)
    printed = two_processes("sharded_models_of_two.py", str(tmp_path))
    found = json.loads(printed.partition("FOUND ")[2].splitlines()[0])
    for name, (main, other) in found["compared"].items():
        _check_saved(name, main)
        assert (other["unwritten"], other["restored"]) == ([], True), name
        assert main["gathered"] == other["gathered"], name
    assert found["most alive"] == 1, "each whole weight is freed before the next one is gathered"
    _check_faults(*found["full"])
    assert found["errors"][0] == found["errors"][1]
    assert found["errors"][0] == {
        "full": "[Errno 27] File too large",
        "merged": "`merge` is True, but the model is sharded over the processes, and adapters are merged only into "
        "whole weights. Leave `merge` out, and run `ftaccum merge` on the saved folder.",
    }
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "not saved").exists()
    tied = GPT2LMHeadModel.from_pretrained(tmp_path / "causal LM, GPT-2" / "model")
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert MixtralForCausalLM.from_pretrained(tmp_path / "Mixtral" / "model").num_parameters() > 0


def _check_saved(name: str, found: dict[str, Any]) -> None:
    """Check what the main process found about the folder of one model."""
    assert found["unwritten"] == [], name
    expected, saved = found["files"]
    assert saved == expected, name
    assert any(file.endswith(".safetensors") for file in saved), name
    assert found["different"] == [], name
    assert found["restored"], name
    assert found["left"] == ["expected", "model"], name
    adapted = {"LoRA with a head": 6, "two adapters, one on embeddings": 11, "prompt tuning": 1}
    assert found["gathered"] == adapted.get(name, found["sharded"]), name
    assert ("own_code.py" in saved) == (name == "own code")


def _check_faults(main: dict[str, Any], other: dict[str, Any]) -> None:
    """Check what both processes found when a model could not be written."""
    assert main["sentences"] == other["sentences"]
    for found in (main, other):
        assert (found["restored"], found["written"], found["left"]) == (True, [], ["model"])
    too_large = "OSError: [Errno 27] File too large."
    reasons = {
        "at most 0 bytes": too_large, "at most 10000 bytes": too_large, "no folder": "NotADirectoryError: ",
        "while saving": "OSError: [Errno 28] No space left on device.",
    }  # fmt: skip
    assert main["sentences"].keys() == reasons.keys()
    for case, (sentence,) in main["sentences"].items():
        assert f"model' cannot be written: {reasons[case]}" in sentence
        assert "The weights take 57.3 kB, and twice that while a sharded model is saved." in sentence
        assert "`save_model` of the result saves it to another place if all of them call it." in sentence
