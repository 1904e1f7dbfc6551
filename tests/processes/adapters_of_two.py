"""Train adapters on two processes. Print a JSON line of the difference from a single process, and the folders saved."""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from invariance import difference, trained

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)

alone = torch.load(sys.argv[1], weights_only=False)
lora = {"r": 3, "init_lora_weights": False}
together = trained("causal LM, Llama", 2, lora=lora, output_dir=sys.argv[2], save="both")
assert together[1].num_processes == 2
files = sorted({path.parent.name for path in Path(sys.argv[2]).glob("*/*.safetensors")})
if state.is_main_process:
    print("FOUND", json.dumps({"difference": difference(alone, together), "files": files}))
state.destroy_process_group()
