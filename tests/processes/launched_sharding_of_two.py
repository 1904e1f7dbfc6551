"""What a run on two CPU processes takes from `accelerate launch --config_file` with FSDP."""

import sys
from pathlib import Path

from torch import distributed
from transformers import BertConfig, BertForSequenceClassification

from ftaccum import SettingsError
from ftaccum.runtime.accelerator import accelerator_session, launched_processes
from ftaccum.runtime.sharding.launcher import find_sharding, hidden_modes
from ftaccum.settings.runtime import Runtime

sizes = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
with launched_processes() as group:
    folder = Path("model")
    group.run_on_main(lambda: BertForSequenceClassification(BertConfig(**sizes)).bert.save_pretrained(folder))
    with hidden_modes():
        model = BertForSequenceClassification.from_pretrained(folder)
    weights = "missing" if any(p.is_meta for p in model.parameters()) else "whole"

with accelerator_session(Runtime(), 0, None) as accelerator:
    n = accelerator.num_processes
    try:
        sharding = str(find_sharding(Runtime(), n))
    except SettingsError as error:
        sharding = "refused, `fsdp_version: 1`" if "`fsdp_version: 1`" in str(error) else str(error)
    kind, backend = accelerator.distributed_type.value, distributed.get_backend()
    sys.stdout.write(f"found: {kind} {backend} {n}, {weights} weights, {sharding}\n")
