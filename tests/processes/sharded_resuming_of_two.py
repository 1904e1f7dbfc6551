"""Interrupt and resume sharded runs on two processes. Print a JSON line of the differences from undisturbed runs.

The argument is a folder with `one/`, a finished run of a single process. This script adds `two/`, a run of two
processes whose weights are sharded.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

from ftaccum import Preempted
from ftaccum.checkpoint.shards import Shard
from ftaccum.runtime.sharding.tensors import local_part, whole_tensor
from interrupted import CutOff, Ended, checkpoints_of, elastic, fine_tuned, ledger_of, model
from training_passes import is_training_pass

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)
folder = Path(sys.argv[1])
found: dict[str, Any] = {}
rank = state.process_index


def on_both(what: list[str]) -> list[str]:
    return [name for names in gather_object([what]) for name in names]


def sharded(trained: nn.Module | None = None, **arguments: Any) -> Ended:
    """Train with sharded weights, and return this process's parts of them."""
    ended = fine_tuned(trained, sharding="fsdp2", **arguments)
    return Ended({name: local_part(t).clone() for name, t in ended.weights.items()}, ended.result)


def ask_one_process(module: Any, *_: Any) -> None:
    if is_training_pass() and module.training and module.n_seen == 7 and rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)


# The model file of a run is not the subject here.
with patch("ftaccum.training.run.write_outputs", lambda result, *_: result):
    kept: dict[str, Any] = {"checkpoint_every": 3, "keep_checkpoints": 100, "restore_best_weights": True}
    whole = sharded(output_dir=str(folder / "whole"), **kept)
    assert all(t.numel() < 200 * 16 for t in whole.weights.values()), "the weights are sharded"
    for name in checkpoints_of(folder / "whole")[::2]:
        there = str(folder / "whole" / "checkpoints" / name)
        again = sharded(output_dir=str(folder / "again"), resume=there, restore_best_weights=True)
        found[name] = on_both(whole.differences(again))
        found[name] += ["ledger"] if ledger_of(folder / "again") != ledger_of(folder / "whole") else []

    # Both processes end in update 8, right after a checkpoint was begun.
    try:
        sharded(cut_off_at=3, output_dir=str(folder / "cut"), **kept)
    except CutOff:
        found["left"] = checkpoints_of(folder / "cut")
    again = sharded(output_dir=str(folder / "cut"), resume="auto", **kept)
    found["cut off"] = on_both(whole.differences(again))

    # One process is asked to stop.
    trained = model()
    trained.register_forward_hook(ask_one_process)
    try:
        sharded(trained, output_dir=str(folder / "asked"), restore_best_weights=True)
    except Preempted as ended:
        found["heard"] = gather_object([[ended.code, str(ended).split(",")[0]]])
    again = sharded(output_dir=str(folder / "asked"), resume="auto", restore_best_weights=True)
    found["asked"] = on_both(whole.differences(again))

    # The disk of the second process is full at first, and training goes on.
    write, failed = Shard.write, []

    def full(self: Shard, place: Path) -> None:
        if self.index.process and not failed:
            failed.append(place)
            raise OSError(28, "No space left on device")
        write(self, place)

    with patch.object(Shard, "write", full):
        again = sharded(output_dir=str(folder / "full"), **kept)
    found["full"] = on_both(whole.differences(again))
    found["full left"] = checkpoints_of(folder / "full")

    # An optimizer that trains other weights than it evaluates, and one with a single moment.
    for kind in ("schedule_free_adamw", "lion"):
        arguments: dict[str, Any] = {"optimizer": kind, "lr_scheduler": "constant", "warmup_steps": 0}
        undisturbed = sharded(output_dir=str(folder / kind), **kept, **arguments)
        there = str(folder / kind / "checkpoints" / "update-00000009")
        found[kind] = on_both(undisturbed.differences(sharded(resume=there, restore_best_weights=True, **arguments)))

    # A whole checkpoint continues in parts. The test continues the parts of this run on a single process.
    _, parts = elastic(sharding="fsdp2", resume=str(folder / "one" / "checkpoints" / "update-00000006"))
    gone_on = {name: whole_tensor(t) for name, t in parts.items()}
    _, whole_again = elastic(resume=str(folder / "one" / "checkpoints" / "update-00000006"))
    elastic(sharding="fsdp2", output_dir=str(folder / "two"), checkpoint_every=3, keep_checkpoints=9)
    _, unsharded = elastic(resume=str(folder / "two" / "checkpoints" / "update-00000006"))
if state.is_main_process:
    torch.save([gone_on, unsharded, whole_again], folder / "gone_on.pt")
    print("FOUND", json.dumps(found))
state.destroy_process_group()
