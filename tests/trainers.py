"""Train a Trainer on fixed rows in order, and compare the gradient of each window with one batch in plain PyTorch."""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import TrainingArguments

from heads import RecordingOptimizer, Row, one_batch, one_batch_gradient, relative_error

# An epoch of rows in order, without clipping, that logs every update and writes nothing.
USUAL: dict[str, Any] = {
    "num_train_epochs": 1,
    "train_sampling_strategy": "sequential",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


class Listed(Dataset):
    """Rows as a torch data set, of which Trainer removes no columns."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> Row:
        return self.rows[n]


def arguments(folder: str, **given: Any) -> TrainingArguments:
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    return TrainingArguments(folder, **USUAL | sizes | {"remove_unused_columns": False} | given)


def gradients(
    trainer_class: Any,
    model: nn.Module,
    rows: Any,
    *,
    collate: Callable[[list[Row]], Any] = one_batch,
    parts: dict[str, Any] | None = None,
    **given: Any,
) -> tuple[list[dict[str, Tensor]], list[float]]:
    """Train for an epoch; return the gradient of each window and the loss that is logged for it.

    Args:
        parts: arguments of the Trainer.
        given: arguments of `TrainingArguments`.
    """
    optimizer = RecordingOptimizer(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=model,
            args=arguments(folder, **given),
            train_dataset=Listed(rows) if isinstance(rows, list) else rows,
            data_collator=collate,
            optimizers=(optimizer, LambdaLR(optimizer, lambda _: 1.0)),
            **parts or {},
        )
        trainer.train()
    return optimizer.gradients, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def window_errors(
    trainer_class: Any, model: nn.Module, rows: list[Row], *, size: int, **given: Any
) -> tuple[list[float], list[float]]:
    """Return the relative error of each window's gradient, and of its loss.

    Args:
        size: the number of rows in a full window.
    """
    windows = [rows[n : n + size] for n in range(0, len(rows), size)]
    wanted = [one_batch_gradient(model, window) for window in windows]
    losses = [model(**one_batch(window)).loss.item() for window in windows]
    found, logged = gradients(trainer_class, model, rows, **given)
    assert [f.keys() for f in found] == [w.keys() for w in wanted]
    return (
        [relative_error(f, w) for f, w in zip(found, wanted, strict=True)],
        [abs(a - b) / abs(b) for a, b in zip(logged, losses, strict=True)],
    )
