"""Verdicts of `verify` on training that is wrong because an inference is replaced. None may be EXACT."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ftaccum import DataError, SettingsError, verify
from ftaccum.data.collator import RowCollator
from ftaccum.training import build_objective

from .case import case

Counts = Callable[[Any], dict[str, float]]


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute temporarily."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def counting(count: Counts, terms: tuple[str, ...] = ("loss",)) -> Any:
    """Replace the inferred terms and count of the loss by these."""
    measured_objective = build_objective.measured_objective

    def miscounted(*arguments: Any, **named: Any) -> Any:
        objective = measured_objective(*arguments, **named)
        objective.count, objective.terms = count, terms
        return objective

    return replaced(build_objective, "measured_objective", miscounted)


def missed(model: nn.Module, rows: list[Any], **arguments: Any) -> float:
    """Return 1 if the verdict on a window of 12 rows is EXACT, and 0 if it is not or the use is refused."""
    try:
        return float(verify(model, rows, batch_size=2, effective_batch_size=12, progress=False, **arguments).exact)
    except (DataError, SettingsError):
        return 0.0


class Padded(nn.Module):
    """A model of tokens that ignores the padding among its labels, as wrappers around T5 do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(30, 8, dtype=torch.float64), nn.Linear(8, 30, dtype=torch.float64)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        labels[labels == 0] = -100
        logits = self.head(self.embedding(input_ids))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"), "logits": logits}


def tokens(n: int, length: int = 6) -> list[int]:
    return torch.randint(3, 30, (length,), generator=torch.Generator().manual_seed(n)).tolist()


@case(1, "`verify` where padding counts among labels that are ignored in place")
def labels_changed_in_place() -> float:
    padded = [tokens(n, 2 + n % 5) + [0] * (4 - n % 5) for n in range(24)]
    with counting(lambda batch: {"loss": batch["labels"].numel()}):
        return missed(Padded(), [{"input_ids": ids, "labels": ids} for ids in padded], reduction="sum")


@case(2, "`verify` where documents of a packed row see each other")
def documents_that_see_each_other() -> float:
    rows = []
    for n in range(24):
        ids = tokens(n, 8)
        positions = [*range(3 + n % 3), *range(5 - n % 3)]
        labels = [-100 if position == 0 else token for token, position in zip(ids, positions, strict=True)]
        rows.append({"input_ids": ids, "labels": labels, "position_ids": positions})
    collate = RowCollator.__call__

    def with_mask(self: RowCollator, *arguments: Any, **named: Any) -> Any:
        batch = collate(self, *arguments, **named)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=30, num_key_value_heads=2, **sizes)).double()
    with replaced(RowCollator, "__call__", with_mask):
        return missed(model, rows)


@case(6, "`verify` where a class weight of 20 is counted as 1")
def weights_of_a_rare_class() -> float:
    torch.manual_seed(0)
    rows = [(torch.randn(8, dtype=torch.float64), torch.tensor(2 if n in (17, 90) else n % 2)) for n in range(400)]
    weights = torch.tensor([1.0, 1.0, 20.0], dtype=torch.float64)
    with counting(lambda batch: {"loss": len(batch[1])}):
        return missed(nn.Linear(8, 3).double(), rows, loss_fn=lambda out, y: F.cross_entropy(out, y, weight=weights))


class TwoHeads(nn.Module):
    """A model that predicts a class and a box for every row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classes, self.boxes = nn.Linear(8, 3, dtype=torch.float64), nn.Linear(8, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.classes(x), self.boxes(x)


def classes_and_boxes(outputs: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    losses = {"classes": F.cross_entropy(outputs[0], batch["y"])}
    with_box = batch["has_box"] > 0
    if with_box.any():
        losses["boxes"] = F.mse_loss(outputs[1][with_box], batch["box"][with_box])
    return losses


@case(8, "`verify` where a term that comes and goes is never trained on")
def term_that_is_dropped() -> float:
    draw = torch.Generator().manual_seed(0)
    x, boxes = (torch.randn(200, size, generator=draw, dtype=torch.float64) for size in (8, 4))
    rows = [{"x": x[n], "y": n % 3, "box": boxes[n], "has_box": int(n % 10 == 3)} for n in range(200)]
    with counting(lambda batch: {"classes": len(batch["y"])}, ("classes",)):
        return missed(TwoHeads(), rows, loss_fn=classes_and_boxes)
