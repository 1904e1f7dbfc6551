"""The error of accumulated gradients against one batch, in each way to train and each precision."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ftaccum import plan, test_fine_tuning

from .job import Job, Row, accelerator, new_model, rows_of

_K = 3  # micro-batches of one row in an update
_REMAINDER = 2  # rows of the last update
_SCALE = 1024.0  # of the loss, for one batch in float16

Gradient = dict[str, Tensor]


class Recorder(torch.optim.Optimizer):
    """An optimizer that records the gradient of each update and does not change the weights."""

    takes_sharded_weights = True  # which ftaccum's trial of the optimizer cannot show

    def __init__(self, model: nn.Module) -> None:
        self.model, self.gradients = model, list[Gradient]()
        super().__init__(model.parameters(), {"lr": 1.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
        named = self.model.named_parameters()  # sharding replaces them
        self.gradients.append({name: _whole(p.grad) for name, p in named if p.grad is not None})


def gradient_errors(job: Job, rank: int) -> dict[str, Any]:  # noqa: ARG001
    """Return the largest relative error ‖found − one batch‖ / ‖one batch‖ of an update, by precision and way.

    The reference is one batch of all rows of the update, in plain PyTorch and float64 where the device has it. With 16
    bits, "one batch" is the error of one batch under the same autocast, which no accumulation can beat.
    """
    widest = widest_type()
    rows = rows_of(new_model(job.model).config.vocab_size, _K * job.num_processes + _REMAINDER, 24, shortest=4)
    windows = windows_of(rows, job.num_processes)
    with no_float32(widest):
        wanted = [one_batch(job.model, window, widest) for window in windows]
        errors: dict[str, dict[str, float]] = {_name(widest): {}, "bf16": {}, "fp16": {}}
        for way, arguments in job.ways.items():
            found = accumulated(job.model, rows, widest, arguments)
            errors[_name(widest)][way] = largest_error(found, wanted)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        plain = [one_batch(job.model, window, torch.float32, autocast=dtype) for window in windows]
        errors[precision]["one batch"] = largest_error(plain, wanted)
        for way, arguments in job.ways.items():
            found = accumulated(job.model, rows, torch.float32, arguments | {"mixed_precision": precision})
            errors[precision][way] = largest_error(found, wanted)
    return {"errors": errors, "windows": [len(window) for window in windows]}


def widest_type() -> torch.dtype:
    """Return float64, or float32 on a device that has none (MPS)."""
    device = accelerator()
    return torch.float32 if device is not None and device.type == "mps" else torch.float64


def windows_of(rows: Sequence[Row], num_processes: int) -> list[list[Row]]:
    """Return the rows of each update."""
    planned = plan(
        len(rows), n_epochs=1, validation_split=0.0, num_processes=num_processes, batch_size=1,
        gradient_accumulation_steps=_K,
    )  # fmt: skip
    return [[rows[n] for n in window.rows] for epoch in planned.epochs for window in planned.windows(epoch)]


def one_batch(name: str, rows: Sequence[Row], dtype: torch.dtype, *, autocast: torch.dtype | None = None) -> Gradient:
    """Return the gradient of the mean loss over one padded batch of all rows, on the host."""
    device = accelerator() or torch.device("cpu")
    model = new_model(name).to(device, dtype).train()
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {
        key: torch.tensor([row[key] + [padding] * (longest - len(row[key])) for row in rows], device=device)
        for key, padding in (("input_ids", 0), ("labels", -100))
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows], device=device)
    batch["attention_mask"] = (torch.arange(longest, device=device) < lengths[:, None]).long()
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        loss = model(**batch).loss
    scale = _SCALE if autocast == torch.float16 else 1.0
    (loss * scale).backward()
    return {n: _on_host(p.grad) / scale for n, p in model.named_parameters() if p.grad is not None}


def accumulated(name: str, rows: Sequence[Row], dtype: torch.dtype, arguments: dict[str, Any]) -> list[Gradient]:
    """Return the gradient of each update that is not skipped, on the host. All processes call this together."""
    model = new_model(name).to(dtype)
    optimizer = Recorder(model)
    test_fine_tuning(
        model, train_data=list(rows), optimizer=optimizer, n_epochs=1, validation_split=0.0, batch_size=1,
        gradient_accumulation_steps=_K, gradient_clip_norm=None, audit=False, progress=False, **arguments,
    )  # fmt: skip
    return optimizer.gradients


def largest_error(found: Sequence[Gradient], wanted: Sequence[Gradient]) -> float:
    """Return the largest relative error. With float16, the scaler may have skipped some updates."""
    if not found:
        raise ArithmeticError("all updates were skipped, because their gradients were not finite")
    if len(found) == len(wanted):
        return max(relative_error(f, w) for f, w in zip(found, wanted, strict=True))
    return max(min(relative_error(f, w) for w in wanted) for f in found)


def relative_error(found: Gradient, wanted: Gradient) -> float:
    zero = torch.zeros(())
    off = sum(float((found.get(n, zero) - wanted.get(n, zero)).square().sum()) for n in found.keys() | wanted.keys())
    return (off / sum(float(g.square().sum()) for g in wanted.values())) ** 0.5


@contextmanager
def no_float32(dtype: torch.dtype) -> Iterator[None]:
    """Keep float64 where the loss of Llama converts to float32, so that only the error of the accumulation is left."""
    to_float32 = torch.Tensor.float
    if dtype == torch.float64:
        patched: Any = torch.Tensor
        patched.float = lambda t: t if t.dtype == torch.float64 else to_float32(t)
    try:
        yield
    finally:
        torch.Tensor.float = to_float32  # type: ignore[method-assign]


def _whole(gradient: Tensor) -> Tensor:
    return _on_host(gradient.full_tensor() if isinstance(gradient, DTensor) else gradient)


def _on_host(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    host = gradient.detach().cpu()
    return host.double().clone()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
