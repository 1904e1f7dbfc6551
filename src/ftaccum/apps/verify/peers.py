"""Accumulate the same micro-batches in other ways, for comparison."""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ...runtime.accelerator import fresh_accelerate_state
from .bench import Bench
from .gradients import WindowGradient, taken
from .splits import Split


def divided_by_k(bench: Bench, split: Split, k: int) -> WindowGradient:
    """Return the gradient of each micro-batch's loss divided by k, as in a simple training loop.

    A loss over the window then reads only the rows of one micro-batch together.
    """
    losses = []
    with bench.from_the_start():
        for micro in bench.micro_batches(split):
            loss = bench.reference.loss(micro.batch) / k
            bench.backward(loss)
            losses.append(loss.item())
    return WindowGradient(bench.taken(), sum(losses))


def why_not_trainer(bench: Bench) -> str | None:
    """Return why Transformers' Trainer cannot be compared; None if it can."""
    if bench.run.accelerator.num_processes > 1:
        return "(shown on one process only)"
    if not bench.run.data.objective.report.own_loss:
        return "(Trainer uses the model's own loss, not the one verified here)"
    if bench.run.accelerator.mixed_precision == "fp16" and bench.run.accelerator.device.type == "cpu":
        return "(Trainer has no fp16 on a CPU)"
    return None


def with_trainer(bench: Bench, split: Split) -> WindowGradient:
    """Return the gradient that Transformers' Trainer gives to an optimizer for the same micro-batches in one update.

    Raises:
        Exception: any error that Trainer raises for a model or a batch that it does not support.
    """
    from transformers import Trainer, TrainingArguments  # takes a second to import

    batches: Any = [micro.batch for micro in bench.micro_batches(split)]
    precision, device = bench.run.accelerator.mixed_precision, bench.run.accelerator.device

    class OfBatches(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(batches, batch_size=None)

    with (
        fresh_accelerate_state(),
        bench.from_the_start(),
        _kept_in_its_mode(bench.run.model),
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),  # it prints what it logs
    ):
        arguments = TrainingArguments(
            folder,
            gradient_accumulation_steps=len(batches),
            max_steps=1,
            max_grad_norm=0.0,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            use_cpu=device.type == "cpu",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
        )
        arguments._n_gpu = min(1, arguments.n_gpu)  # on several, Trainer would accumulate differently
        optimizer = _Recording(bench.run.model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        trainer = OfBatches(bench.run.model, arguments, train_dataset=[{}], optimizers=(optimizer, schedule))
        loss = trainer.train().training_loss
        if optimizer.gradient is None:
            raise ValueError("Trainer took no step")
        return WindowGradient(optimizer.gradient, loss)


class _Recording(torch.optim.Optimizer):
    """An optimizer that records the gradient, and does not change the weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__([p for p in model.parameters() if p.requires_grad], {"lr": 0.0})
        self._model = model
        self.gradient: list[Tensor | None] | None = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override] # noqa: ARG002
        self.gradient = taken(self._model.parameters())


@contextmanager
def _kept_in_its_mode(model: Any) -> Iterator[None]:
    """Keep the train or eval mode of each module, and the setting of the cache, which Trainer changes.

    Trainer would put all modules in train mode before each pass, including those that are in eval mode so that they do
    not draw random numbers.
    """
    config = getattr(model, "config", None)
    uses_cache = getattr(config, "use_cache", None)
    model.train = lambda mode=True: model  # noqa: ARG005
    try:
        yield
    finally:
        del model.train
        if config is not None and uses_cache is not None:
            config.use_cache = uses_cache
