"""Measure where the time of a pass goes, for MiniLM with a classification head and with a masked-LM head.

One window of film reviews is trained again and again, cut into micro-batches of 8 rows and into single rows. For both
cuts, the script times ftaccum's `GradientAccumulator` and a bare loop of the loss and `backward()` over the same
batches, in interleaved rounds on one thread. Milliseconds of the processor, which exclude the time in which other
programs used the core; medians over the rounds.

- forward, backward: of the bare loop, per pass.
- adding up: the part of its backward pass that adds gradients to those of earlier passes; the difference to passes
  whose gradients are dropped before each of them.
- sparse, in place: the time that ftaccum saves in a pass by sparse gradients of input embeddings, and by adding
  gradients of large linear layers in place.
- around the model: the time of a pass in ftaccum, with neither of them, minus the bare loop's.
- clipping, optimizer, clearing: per update.

The loss is the model's own. The task "labelled positions" is the masked LM again, with logits at labelled positions
only, also in the bare loop.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/profile_passes.py
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))

import datasets
import torch
import transformers
from torch import nn
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling, set_seed

import packaged
from ftaccum.accumulation.accumulator import GradientAccumulator
from ftaccum.data.loader import MicroBatch
from ftaccum.objective.labelled_head import LabelledHead, NeededLogits
from ftaccum.objective.labelled_positions import LabelledPositions
from ftaccum.runtime.accelerator import accelerator_session
from ftaccum.runtime.gradients import in_place
from ftaccum.runtime.gradients.plain import GradientStrategy
from ftaccum.runtime.process_group import SINGLE
from ftaccum.settings.runtime import Runtime
from measuring import machine
from workloads import Row, movies

SEED, ROWS, BATCH = 42, 32, 8
TASKS = ("classification", "masked LM", "labelled positions")
PASS_COLUMNS = ("forward", "backward", "adding up", "sparse", "in place", "around the model", "pass in ftaccum")
UPDATE_COLUMNS = ("clipping", "optimizer", "clearing")


class OwnLoss:
    """The model's own loss as an objective, with nothing measured or checked."""

    terms, window, modules = ("loss",), None, ()

    def means(self, model: Any, batch: Any, *_: Any) -> tuple[dict[str, torch.Tensor], None]:
        return {"loss": self.loss(model, batch)}, None

    def attributes_before_lazy_passes(self) -> None:
        """Return None: no layer is lazy."""

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        loss: torch.Tensor = model(**batch).loss
        return loss


class LabelledLoss(OwnLoss):
    """The same with logits at labelled positions only."""

    def __init__(self, model: Any) -> None:
        self._head = LabelledHead(
            model, model.get_output_embeddings(), LabelledPositions(shifts=False, ignore_index=-100)
        )
        self._head.gives_logits = True

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        return self._head(lambda given: model(**given), batch, needs=NeededLogits.NONE)[0]


@contextmanager
def ftaccum_with(*, sparse: bool, in_place: bool) -> Iterator[None]:
    """Let ftaccum treat gradients as autograd does, except for these."""
    package = "ftaccum.runtime.gradients"
    with (
        nullcontext() if sparse else patch(f"{package}.sparse._can_be_sparse", return_value=False),
        nullcontext() if in_place else patch(f"{package}.in_place._can_add", return_value=False),
    ):
        yield


def milliseconds(work: Callable[[], Any]) -> float:
    begun = time.process_time()
    work()
    return 1000 * (time.process_time() - begun)


def bare(model: Any, objective: OwnLoss, batches: list[Any], *, drops: bool) -> tuple[float, float]:
    """Return the time of the forward and of the backward passes, without the first one, which only sets gradients."""
    forward, backward = [], []
    for batch in batches:
        if drops:
            model.zero_grad(set_to_none=True)
        begun = time.process_time()
        loss = objective.loss(model, batch)
        forward.append(1000 * (time.process_time() - begun))
        backward.append(milliseconds(loss.backward))
    return sum(forward[1:]) / len(forward[1:]), sum(backward[1:]) / len(backward[1:])


def profile(model: Any, objective: OwnLoss, batches: list[Any], rounds: int) -> dict[str, float]:
    """Return the columns of the table for one model and one cut of the window."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    micro_batches = [MicroBatch.of(batch, {"loss": len(batch["input_ids"])}) for batch in batches]
    variants = {"plain": (False, False), "sparse": (True, False), "both": (True, True)}
    with accelerator_session(Runtime(), SEED, None) as accelerator:
        accumulators = {}
        for name, (sparse, in_place) in variants.items():
            with ftaccum_with(sparse=sparse, in_place=in_place):
                strategy = GradientStrategy(optimizer)
                accumulators[name] = GradientAccumulator(accelerator, model, objective, strategy, SINGLE)  # type: ignore[arg-type]
        found = [
            _round(model, objective, batches, micro_batches, accumulators, variants, optimizer)
            for _ in range(rounds + 1)
        ]
    return {name: median(times[name] for times in found[1:]) for name in found[0]}  # the first one is a warm-up


def _round(
    model: Any, objective: OwnLoss, batches: list[Any], micro_batches: list[MicroBatch], accumulators: dict[str, Any],
    variants: dict[str, tuple[bool, bool]], optimizer: Any,
) -> dict[str, float]:  # fmt: skip
    ours = {}
    for name, accumulator in accumulators.items():
        accumulator.zero_gradients()
        sparse, in_place = variants[name]
        with ftaccum_with(sparse=sparse, in_place=in_place):
            whole = milliseconds(partial(accumulator.accumulate, micro_batches))
            accumulator.zero_gradients()
            first = milliseconds(partial(accumulator.accumulate, micro_batches[:1]))
        ours[name] = (whole - first) / (len(batches) - 1)
    _, alone = bare(model, objective, batches, drops=True)
    model.zero_grad(set_to_none=True)
    forward, backward = bare(model, objective, batches, drops=False)
    return {
        "forward": forward,
        "backward": backward,
        "adding up": backward - alone,
        "sparse": ours["plain"] - ours["sparse"],
        "in place": ours["sparse"] - ours["both"],
        "around the model": ours["plain"] - forward - backward,
        "pass in ftaccum": ours["both"],
        "clipping": milliseconds(lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0)),
        "optimizer": milliseconds(optimizer.step),
        "clearing": milliseconds(optimizer.zero_grad),
    }


def masked(collate: Any, rows: list[Row]) -> Any:
    set_seed(SEED)
    return collate([{"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]} for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, nargs="+", default=[BATCH, 1], help="rows of a micro-batch")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--compile", action="store_true", help="compile the models, as `compile=True` does")
    parser.add_argument(
        "--least-bytes",
        type=int,
        default=in_place._LEAST_BYTES,
        help="smallest weight whose gradient is added in place",
    )
    options = parser.parse_args()
    in_place._LEAST_BYTES = options.least_bytes
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    workload = movies(SEED)
    tokenizer = AutoTokenizer.from_pretrained(packaged.MINILM)
    masks = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    masked_lm = AutoModelForMaskedLM.from_pretrained(packaged.MINILM)
    tasks: dict[str, tuple[Any, OwnLoss, Any]] = {
        "classification": (workload.new_model(), OwnLoss(), workload.collate),
        "masked LM": (masked_lm, OwnLoss(), partial(masked, masks)),
        "labelled positions": (masked_lm, LabelledLoss(masked_lm), partial(masked, masks)),
    }
    rows = sorted(workload.rows.select(range(ROWS)).to_list(), key=lambda row: len(row["input_ids"]))
    print(machine(), f"\n\n| | {' | '.join((*PASS_COLUMNS, *UPDATE_COLUMNS))} |\n|" + " --- |" * 11)
    for name in options.task:
        model, objective, collate = tasks[name]
        model.train()
        if options.compile:
            model.compile(dynamic=True)
        for size in options.size:
            batches = [collate(rows[start : start + size]) for start in range(0, ROWS, size)]
            times = profile(model, objective, batches, options.rounds)
            cells = [f"{times[column]:.1f}" for column in (*PASS_COLUMNS, *UPDATE_COLUMNS)]
            print(f"| {name}, {len(batches)} passes of {size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
