"""Count the bytes that each of two processes holds during an update, with whole copies of a model and with shards.

    torchrun --nproc_per_node 2 tests/processes/bytes_of_two.py      # prints the table of docs/launching.md

With `--json`, print one line of JSON instead, {way: {moment: {kind: bytes}}} for each process, with runs that evaluate,
audit and keep the best weights, and with runs that keep a whole copy by mistake.
"""

import gc
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from ftaccum import test_fine_tuning
from ftaccum.accumulation.accumulator import GradientAccumulator
from ftaccum.objective import signed_sums

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)
gc.collect()
gc.freeze()  # hides what was imported, through which each count would look

# All first dimensions are even, so that each process holds exactly half of each weight.
CONFIG = LlamaConfig(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=True,
)  # fmt: skip
ROWS = [{"input_ids": list(range(1, 9)), "labels": list(range(1, 9))}] * 12
WAYS = {
    "whole copies": {"sharding": "off"},
    "sharded, each": {"sharding": "fsdp2", "sync": "each"},
    "sharded, last": {"sharding": "fsdp2", "sync": "last"},
}
EVERYTHING = {"val_data": ROWS[:5], "evaluate_every": 2, "restore_best_weights": True, "audit": 2}
START, BETWEEN, BEFORE, AFTER = "before the first pass", "between passes", "before the step", "after the step"


class Held:
    """The bytes of all tensors of floating-point numbers that this process holds, at each moment of training.

    Attributes:
        moments: for each moment, the bytes by kind: weights, gradients, moments (of the optimizer), other. Of several
            moments with the same name, the largest of each kind.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.optimizer: torch.optim.Optimizer | None = None
        self.after_pass: Callable[[], None] = lambda: None
        self.moments: dict[str, dict[str, int]] = {}

    def count(self, moment: str) -> None:
        if not self.moments and moment != START:
            return  # the run tries the optimizer before it shards the model
        every = all_tensors()
        states = [] if self.optimizer is None else self.optimizer.state.values()
        of_kinds: dict[str, Iterable[Any]] = {
            "weights": list(self._model.parameters()),
            "moments": [value for state in states for value in state.values()],
            "gradients": [t.grad for t in every if t.is_leaf and t.grad is not None],
            "other": every,
        }
        seen: set[int] = set()
        found = self.moments.setdefault(moment, {})
        for kind, tensors in of_kinds.items():
            storages = storages_of(tensors)
            held = sum(n_bytes for place, n_bytes in storages.items() if place not in seen)
            seen |= storages.keys()
            found[kind] = max(held, found.get(kind, 0))


def all_tensors() -> list[Tensor]:
    """Return all tensors of floating-point numbers that any object of this process refers to."""
    gc.collect()
    found = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    # Autograd holds gradients where the garbage collector does not see them.
    found += [t.grad for t in found if t.is_leaf and t.grad is not None]
    return [t for t in found if t.is_floating_point() and not t.is_meta]


def storages_of(tensors: Iterable[Any]) -> dict[int, int]:
    """Return the bytes of the different storages of tensors by address; of DTensors, those of their local parts."""
    parts = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if isinstance(t, Tensor)]
    storages = [t.untyped_storage() for t in parts if t.is_floating_point() and t.ndim]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


class CountingAdamW(torch.optim.AdamW):
    """AdamW that counts what is held before and after its steps."""

    def __init__(self, held: Held, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.held = held

    def step(self, closure: Any = None) -> Any:
        self.held.optimizer = self
        self.held.count(BEFORE)
        returned = super().step(closure)
        self.zero_grad()  # as the run does next
        self.held.count(AFTER)
        return returned


class CountAtStart(TrainerCallback):
    def __init__(self, held: Held) -> None:
        self.held = held

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.held.count(START)


@contextmanager
def counted_passes(held: Held) -> Iterator[None]:
    """Count after each pass but the last one of a window."""
    done = GradientAccumulator._pass_done

    def pass_done(accumulator: Any) -> None:
        if not accumulator._accelerator.sync_gradients:
            held.after_pass()
            held.count(BETWEEN)
        done(accumulator)

    with patch.object(GradientAccumulator, "_pass_done", pass_done):
        yield


def keep_nothing(_: nn.Module) -> None:
    return None


def keep_whole_weights(model: nn.Module) -> list[Tensor]:
    """Keep a reference to the weights from before they are sharded."""
    return [p.data for p in model.parameters()]


def keep_gathered(model: nn.Module) -> Callable[[], None]:
    """Return a function that gathers a block after a pass, and leaves it so."""
    return lambda: model.model.layers[0].unshard()


def run(keep: Callable[[nn.Module], Any], **arguments: Any) -> dict[str, dict[str, int]]:
    """Train for some updates, and return the bytes held at each moment."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    held, kept = Held(model), keep(model)
    if callable(kept):
        held.after_pass = kept
    # The table of random signs, of a fixed size, that measuring a loss would leave in a cache.
    with counted_passes(held), patch.object(signed_sums, "_random_signs", signed_sums._random_signs.__wrapped__):
        test_fine_tuning(
            model, train_data=ROWS, optimizer=partial(CountingAdamW, held), n_epochs=2, batch_size=1,
            effective_batch_size=6, progress=False, callbacks=[CountAtStart(held)],
            **{"validation_split": 0.0, "audit": False} | arguments,
        )  # fmt: skip
    del kept
    return held.moments


def table(found: dict[str, dict[str, dict[str, int]]]) -> str:
    """Return the table of the documentation, as shares of the bytes of the whole weights."""
    whole = found["whole copies"][START]["weights"]
    rows = {
        "weights": ("weights", BETWEEN),
        "gradients between two passes": ("gradients", BETWEEN),
        "gradients before the step": ("gradients", BEFORE),
        "moments of AdamW": ("moments", AFTER),
        "anything else": ("other", BEFORE),
    }
    lines = ["| what | whole copies (DDP) | sharded, `each` | sharded, `last` |", "| --- | --- | --- | --- |"]
    for name, (kind, moment) in rows.items():
        cells = [f"{found[way][moment][kind] / whole:.2f}" for way in WAYS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(as_json: bool) -> None:
    found = {way: run(keep_nothing, **arguments) for way, arguments in WAYS.items()}
    if as_json:
        for way, arguments in WAYS.items():
            found[f"{way}, with everything"] = run(keep_nothing, **arguments, **EVERYTHING)
        sharded = WAYS["sharded, each"]
        found["whole weights kept"] = run(keep_whole_weights, **sharded)
        found["a block left gathered"] = run(keep_gathered, **sharded)
        print_once("FOUND " + json.dumps(gather_object([found])))
    else:
        print_once(table(found))
    state.destroy_process_group()


def print_once(text: str) -> None:
    if state.is_main_process:
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:] == ["--json"])
