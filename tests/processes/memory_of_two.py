"""Shard a tiny language model over two processes, update it once, and print the bytes that each process holds."""

import json

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import LlamaForCausalLM

from ftaccum.runtime.gradients.sharded import ShardedGradients
from ftaccum.runtime.process_group import open_process_group
from ftaccum.runtime.sharding.options import ShardingOptions
from ftaccum.runtime.sharding.units import candidate_units
from ftaccum.settings.recipe import Recipe
from ftaccum.training.named_optimizers import make_named
from ftaccum.training.parameter_groups import parameter_groups
from held_bytes import TINY_LLAMA, bytes_of_states, bytes_of_storages

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)


def held(dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes that this process holds after a backward pass and a step, by the names of the estimate."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(TINY_LLAMA).to(dtype)
    optimizer = make_named(Recipe(), parameter_groups(model, Recipe()))
    input_ids = torch.randint(0, TINY_LLAMA.vocab_size, (2, 8))
    with open_process_group(2) as group:
        gradients = ShardedGradients(optimizer, ShardingOptions(), group, lambda: list(candidate_units(model)))
        gradients.shard(model, torch.device("cpu"))
        gradients.begin_pass(is_last=True, counts=True)
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        of_one_pass = bytes_of_storages(p.grad for p in gradients.weights)
        gradients.end_pass()
        is_wide = dtype == torch.float32
        sums = 0 if is_wide else bytes_of_storages(p.grad for p in gradients.parameters)
        gradients.show()
        optimizer.step()
        model.reshard()
        gradients.close()
    return {
        "weights": bytes_of_storages(model.parameters()),
        "gradients": of_one_pass,
        "gradient_sums": sums,
        "optimizer_states": bytes_of_states(optimizer),
    }


found = gather_object([{name: held(getattr(torch, name)) for name in ("float32", "bfloat16")}])
if state.is_main_process:
    print("FOUND", json.dumps(found))
state.destroy_process_group()
