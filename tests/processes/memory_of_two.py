"""Shard a tiny language model over two processes, update it once, and print the bytes that each process holds."""

import json

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaForCausalLM

from ftaccum.apps.memory.units import blocks_of
from ftaccum.settings.recipe import Recipe
from ftaccum.training.named_optimizers import make_named
from ftaccum.training.parameter_groups import parameter_groups
from held_bytes import TINY_LLAMA, bytes_of_states, bytes_of_storages

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)
torch.manual_seed(0)
model = LlamaForCausalLM(TINY_LLAMA)
policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
blocks = blocks_of(model)
for block in blocks:
    fully_shard(block, mp_policy=policy)
fully_shard(model, mp_policy=policy)
optimizer = make_named(Recipe(), parameter_groups(model, Recipe()))
input_ids = torch.randint(0, TINY_LLAMA.vocab_size, (2, 8))
model(input_ids=input_ids, labels=input_ids).loss.backward()
optimizer.step()
model.reshard()
held = {
    "blocks": len(blocks),
    "weights": bytes_of_storages(model.parameters()),
    "gradients": bytes_of_storages(p.grad for p in model.parameters()),
    "optimizer_states": bytes_of_states(optimizer),
}
found = gather_object([held])
if state.is_main_process:
    print("FOUND", json.dumps(found))
state.destroy_process_group()
