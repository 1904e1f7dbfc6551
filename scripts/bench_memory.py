"""Measure the peak memory of fine-tuning for different numbers and sizes of micro-batches.

Each setting runs in its own process. On a CPU, the peak is the most bytes that torch's allocator had handed out
(including weights, gradients, optimizer and batches), from the profiler's record of every allocation. A second run
without the profiler gives the largest growth of the process's resident memory. On CUDA, the peak is
`torch.cuda.max_memory_allocated`. Models are small and have random weights; all rows have the same length.

Memory at each k is compared with k = 2, not k = 1: from k = 2 on, forward passes run while the gradients of earlier
micro-batches are in memory.

The table of logits is the exception: SmolLM2-135M with real weights, and the growth in the passes of an update alone.
The self-check and audits compute all logits of a few rows.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_memory.py                    # about four minutes on one thread
    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_memory.py --tables logits    # about ten minutes
"""

import argparse
import contextlib
import gc
import io
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler logs every start
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))

import psutil
import torch
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import packaged
from ftaccum import test_fine_tuning
from ftaccum.accumulation.accumulator import GradientAccumulator
from measuring import DEVICE, machine

MB = 1e6
ROW_LENGTH, VOCABULARY, UPDATES = 64, 4096, 2  # in the second update the optimizer has a state
K, BATCH = (1, 2, 4, 8, 16, 32, 64), 4
BATCHES, EFFECTIVE = (1, 2, 4, 8, 16, 32), 32
IMAGES, IMAGE_EPOCHS = 100, 2
LONG_ROW = 512

Run = Callable[[], Any]


@dataclass(frozen=True)
class Peak:
    """Peak bytes of torch's allocator, and the largest growth of the process (None on a GPU)."""

    allocated: int
    resident: int | None

    def cells(self) -> list[str]:
        return [f"{self.allocated / MB:.1f}", "–" if self.resident is None else f"{self.resident / MB:.0f}"]


def text_run(batch_size: int, k: int, checkpointing: bool) -> dict[str, Any]:
    ids = torch.randint(1, VOCABULARY, (UPDATES * batch_size * k, ROW_LENGTH)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return _trained(llama(), rows, batch_size, k, gradient_checkpointing=checkpointing)


def image_run(batch_size: int, k: int) -> dict[str, Any]:
    images = [(torch.randn(3, 64, 64), torch.tensor(n % 10)) for n in range(IMAGES)]
    return _trained(conv_net(), images, batch_size, k, n_epochs=IMAGE_EPOCHS, loss_fn=nn.CrossEntropyLoss())


def logits_run(loss_head: str, labelled: float, checkpointing: bool) -> int:
    """Train SmolLM2 in bf16 autocast on 4 × 512 tokens an update; return the growth of memory in the last update.

    Args:
        labelled: the share of each row that has labels, at its end.
    """
    model = AutoModelForCausalLM.from_pretrained(packaged.SMOLLM)
    n_ignored = LONG_ROW - int(labelled * LONG_ROW)
    ids = torch.randint(1, model.config.vocab_size, (UPDATES * BATCH, LONG_ROW)).tolist()
    rows = [{"input_ids": row, "labels": [-100] * n_ignored + row[n_ignored:]} for row in ids]
    peaks, accumulate = [], GradientAccumulator.accumulate

    def recorded(*given: Any, **options: Any) -> Any:
        peak, found = _allocated_at_most(accumulate, *given, **options)
        peaks.append(peak)
        return found

    options = {"loss_head": loss_head, "gradient_checkpointing": checkpointing, "mixed_precision": "bf16"}
    with patch.object(GradientAccumulator, "accumulate", recorded):
        _trained(model, rows, BATCH, 1, **options)
    return int(peaks[-1])


def zeroing_run(k: int, set_to_none: bool) -> int:
    """Run a bare loop, and return the bytes that it keeps between updates."""
    model = llama().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(UPDATES):
        for _ in range(k):
            ids = torch.randint(1, VOCABULARY, (BATCH, ROW_LENGTH), device=DEVICE)
            (model(input_ids=ids, labels=ids).loss / k).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    moments = [value for state in optimizer.state.values() for value in state.values()]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *gradients, *moments])


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=683, num_hidden_layers=4, num_attention_heads=4,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def conv_net() -> nn.Module:
    """Return a network without batch norm, which would mix the rows of a micro-batch."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def _trained(model: nn.Module, rows: Sequence[Any], batch_size: int, k: int, **options: Any) -> dict[str, Any]:
    given = {"n_epochs": 1, "gradient_accumulation_steps": k, "batch_size": batch_size, **options}
    with contextlib.redirect_stdout(io.StringIO()):
        return dict(test_fine_tuning(model, train_data=rows, validation_split=0.0, progress=False, **given))


def measured(run: Callable[..., Any], *given: Any) -> tuple[Peak, Any]:
    """Return the peak memory of a run, and its result."""
    if DEVICE.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        found = run(*given)
        return Peak(torch.cuda.max_memory_allocated(), None), found
    allocated, found = _apart(_allocated_at_most, run, *given)
    resident = _apart(_grown_at_most, run, *given)
    return Peak(allocated, resident), found


def _allocated_at_most(run: Callable[..., Any], *given: Any, **options: Any) -> tuple[int, Any]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        found = run(*given, **options)
    assert record.profiler is not None
    changes = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        now += change.nbytes()  # negative for freed memory
        most = max(most, now)
    return most, found


def _grown_at_most(run: Callable[..., Any], *given: Any) -> int:
    before = psutil.Process().memory_info().rss
    run(*given)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def _apart(function: Callable[..., Any], *given: Any) -> Any:
    """Return the result of a function that runs in a forked process, which need not import anything again."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(*given)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def check_gauge() -> None:
    """Check that the peak is 30 MB for a run that allocates 10 and 20 MB, frees 10 and allocates 5."""

    def known() -> None:
        first = torch.empty(10_000_000, dtype=torch.uint8, device=DEVICE)
        second = torch.empty(20_000_000, dtype=torch.uint8, device=DEVICE)
        del first
        torch.empty(5_000_000, dtype=torch.uint8, device=DEVICE)
        del second

    peak, _ = measured(known)
    assert abs(peak.allocated - 30_000_000) < 10_000, f"allocated 30 MB, but measured {peak.allocated / MB} MB"


def against_k() -> Iterator[str]:
    yield f"micro-batches of {BATCH} rows of {ROW_LENGTH} tokens, peak in MB:\n"
    names = ["peak", "against k = 2", "process grew by"]
    yield _row("k", *names, *(f"{name}, checkpointing" for name in names))
    yield _row(*["---"] * 7)
    found = {(k, again): measured(text_run, BATCH, k, again)[0] for k in K for again in (False, True)}
    for k in K:
        cells = [str(k)]
        for again in (False, True):
            allocated, resident = found[k, again].cells()
            cells += [allocated, f"{found[k, again].allocated / found[2, again].allocated - 1:+.1%}", resident]
        yield _row(*cells)


def against_batch() -> Iterator[str]:
    yield f"{EFFECTIVE} rows of {ROW_LENGTH} tokens an update, peak in MB:\n"
    yield _row("batch × k", "peak", "process grew by", "peak, checkpointing", "process grew by")
    yield _row(*["---"] * 5)
    for batch_size in BATCHES:
        k = EFFECTIVE // batch_size
        cells = [cell for again in (False, True) for cell in measured(text_run, batch_size, k, again)[0].cells()]
        yield _row(f"{batch_size} × {k}", *cells)


def images() -> Iterator[str]:
    yield f"{IMAGES} images of 3 × 64 × 64, a small convolutional net, peak in MB:\n"
    yield _row("batch × k", "effective batch", "updates an epoch", "peak", "process grew by")
    yield _row(*["---"] * 5)
    for batch_size, k in ((20, 1), (10, 8), (80, 1)):
        peak, result = measured(image_run, batch_size, k)
        updates = result["optimizer_steps"] // IMAGE_EPOCHS
        yield _row(f"{batch_size} × {k}", str(result["effective_batch_size"]), str(updates), *peak.cells())


def zeroing() -> Iterator[str]:
    yield f"A bare loop, micro-batches of {BATCH} rows of {ROW_LENGTH} tokens, in MB:\n"
    yield _row("k", "`zero_grad`", "peak", "process grew by", "kept between updates")
    yield _row(*["---"] * 5)
    for k in (1, 8):
        for set_to_none in (True, False):
            peak, kept = measured(zeroing_run, k, set_to_none)
            yield _row(str(k), f"`set_to_none={set_to_none}`", *peak.cells(), f"{kept / MB:.1f}")


def logits() -> Iterator[str]:
    packaged.prepare(packaged.SMOLLM)
    gradients = sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(packaged.SMOLLM).parameters())
    yield f"SmolLM2-135M, {BATCH} rows of {LONG_ROW} tokens, bf16 autocast, activations and logits in MB:\n"
    yield _row(
        "labels",
        "all logits",
        "at labels, in chunks",
        "share",
        *(f"{name}, checkpointing" for name in ("all", "at labels", "share")),
    )
    yield _row(*["---"] * 7)
    for labelled in (1.0, 0.5):
        cells = []
        for checkpointing in (False, True):
            every, few = (_apart(logits_run, head, labelled, checkpointing) - gradients for head in ("full", "auto"))
            cells += [f"{every / MB:.1f}", f"{few / MB:.1f}", f"{few / every:.2f}"]
        yield _row(f"{labelled:.0%}", *cells)


TABLES = {
    "k": against_k,
    "batch": against_batch,
    "images": images,
    "zeroing": zeroing,
    "logits": logits,
}


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=[name for name in TABLES if name != "logits"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    print(machine())
    if DEVICE.type == "cpu":
        text_run(1, 1, False)  # so that imports at first use do not count
    check_gauge()
    for name in options.tables:
        print()
        for line in TABLES[name]():
            print(line, flush=True)


if __name__ == "__main__":
    main()
