"""Generate samples on the main process of a sharded run. Print a JSON line of the texts, sharded and whole."""

import json
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset

from ftaccum import test_fine_tuning
from ftaccum.callbacks import GenerateSamples
from silent_errors.text_columns import REVIEWS, causal_lm, word_tokenizer

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)


def samples(**arguments: Any) -> list[Any]:
    callback = GenerateSamples(["good film", "bad"], max_new_tokens=3)
    test_fine_tuning(
        causal_lm(), train_data=Dataset.from_dict({"text": REVIEWS}), tokenizer=word_tokenizer(), n_epochs=2,
        evaluate_every=1, batch_size=2, callbacks=[callback], progress=False, verbosity="quiet", **arguments,
    )  # fmt: skip
    return callback.samples


found = [samples(), samples(sharding="fsdp2")]
if state.is_main_process:
    print("SAMPLES", json.dumps(found))
state.destroy_process_group()
