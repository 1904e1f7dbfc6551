"""Measure the cost of two passes over an update, as a mixture of experts and a loss over the window need them.

Each setting is trained in both ways, interleaved in rounds: over the whole update (`router_balance="window"`, or
`loss_over="window"`), and over each micro-batch alone (`router_balance="micro_batch"`, or the same loss per
micro-batch), which is another loss and takes one pass. Times are those of the updates only, without the measurements
before training, and on a CPU those of the processor: the medians of the rounds, and of the rounds' ratios. Memory is
the most bytes that torch's allocator had handed out, from the profiler's record of one run. Models have random weights;
rows have the same length.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_two_passes.py      # some five minutes on one thread
"""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler logs every start
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertModel, MixtralConfig, MixtralForCausalLM

from ftaccum import test_fine_tuning
from measuring import DEVICE, machine, now, quiet

MB, VOCABULARY, LENGTH, EFFECTIVE, UPDATES = 1e6, 1024, 32, 16, 3
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}


class Clock(torch.optim.SGD):
    """An optimizer that notes the time of each step."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=1e-4)
        self.steps: list[float] = []

    def step(self, closure: Any = None) -> Any:
        self.steps.append(time.process_time() if DEVICE.type == "cpu" else now())
        return super().step(closure)


@dataclass(frozen=True)
class Setting:
    """A model and its rows, trained over the whole update or over each micro-batch."""

    name: str
    model: Callable[[], torch.nn.Module]
    row: Callable[[Tensor], dict[str, Any]]
    over_window: dict[str, Any]
    over_micro_batch: dict[str, Any]
    batch_size: int
    checkpointing: bool

    def seconds(self, *, window: bool, updates: int = UPDATES) -> float:
        """Return the seconds of an update: the first one only starts the clock."""
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(3, VOCABULARY, ((updates + 1) * EFFECTIVE, LENGTH), generator=draw)
        with quiet(0), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = self.model().to(DEVICE)
            optimizer = Clock(model.parameters())
            test_fine_tuning(
                model, train_data=[self.row(row) for row in ids], optimizer=optimizer, batch_size=self.batch_size,
                effective_batch_size=EFFECTIVE, gradient_checkpointing=self.checkpointing, audit=False, n_epochs=1,
                validation_split=0.0, progress=False, **(self.over_window if window else self.over_micro_batch),
            )  # fmt: skip
        return (optimizer.steps[-1] - optimizer.steps[0]) / updates

    def peak(self, *, window: bool) -> int:
        """Return the peak bytes of a run."""
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.seconds(window=window, updates=1)
            return torch.cuda.max_memory_allocated()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            self.seconds(window=window, updates=1)
        assert record.profiler is not None
        events = record.profiler.kineto_results.events()
        held = most = 0
        for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
            held += change
            most = max(most, held)
        return most


def experts() -> torch.nn.Module:
    config = MixtralConfig(
        **SIZES, intermediate_size=256, num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=2,
        output_router_logits=True, router_aux_loss_coef=0.02,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def encoder() -> torch.nn.Module:
    return BertModel(BertConfig(**SIZES, intermediate_size=512), add_pooling_layer=False)


def pool(outputs: Any, batch: Any) -> Tensor:
    mask = batch["attention_mask"][..., None]
    return F.normalize((outputs.last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)


def contrastive(embeddings: Tensor, batch: Any) -> Tensor:
    """Return the cross entropy of each row among all rows; its own words, drawn again by dropout, would be its pair."""
    del batch
    scores = embeddings @ embeddings.detach().T * 20
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def settings(batch_sizes: list[int]) -> list[Setting]:
    found = []
    for batch_size in batch_sizes:
        for checkpointing in (False, True):
            found.append(
                Setting(
                    "mixture of experts",
                    experts,
                    lambda ids: {"input_ids": ids, "labels": ids},
                    {"router_balance": "window"},
                    {"router_balance": "micro_batch"},
                    batch_size,
                    checkpointing,
                )
            )
            found.append(
                Setting(
                    "contrastive loss",
                    encoder,
                    lambda ids: {"input_ids": ids},
                    {"loss_fn": contrastive, "loss_over": "window", "loss_inputs": pool},
                    {"loss_fn": lambda outputs, batch: contrastive(pool(outputs, batch), batch)},
                    batch_size,
                    checkpointing,
                )
            )
    return sorted(found, key=lambda setting: setting.name, reverse=True)


def main() -> None:
    options = _options()
    transformers.logging.set_verbosity_error()
    print(machine(), end="\n\n")
    print(
        "| loss | rows | checkpointing | one pass, s | two passes, s | time | one pass, MB | two passes, MB | memory |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for setting in settings(options.batch_sizes):
        times: dict[bool, list[float]] = {False: [], True: []}
        for n in range(options.rounds):
            for window in (False, True) if n % 2 else (True, False):
                times[window].append(setting.seconds(window=window))
        ratios = [two / one for one, two in zip(times[False], times[True], strict=True)]
        one, two = setting.peak(window=False), setting.peak(window=True)
        cells = [
            setting.name, f"{setting.batch_size} × {EFFECTIVE // setting.batch_size}",
            "yes" if setting.checkpointing else "no",
            f"{median(times[False]):.2f}", f"{median(times[True]):.2f}",
            f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
            f"{one / MB:.0f}", f"{two / MB:.0f}", f"{two / one:.2f}",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 8], metavar="ROWS", help="default: 2 8")
    return parser.parse_args()


if __name__ == "__main__":
    main()
