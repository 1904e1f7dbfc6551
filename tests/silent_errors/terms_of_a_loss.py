"""Losses with several terms, some of which are missing in some batches."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import case, update_error


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.cls, self.box = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 4)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.body(x).tanh()
        return self.cls(inner), self.box(inner)


def rows_with_boxes(with_box: set[int], n_rows: int = 12) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(5, generator=draw).double(), "y": n % 3, "has_box": int(n in with_box),
            "box": torch.randn(4, generator=draw).double(),
        }
        for n in range(n_rows)
    ]  # fmt: skip


def two_terms(outputs: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    classes, boxes = outputs
    loss = {"cls": F.cross_entropy(classes, batch["y"])}
    has_box = batch["has_box"].bool()
    if has_box.any():
        loss["box"] = F.smooth_l1_loss(boxes[has_box], batch["box"][has_box])
    return loss


def counts(batch: dict[str, Tensor]) -> dict[str, Any]:
    return {"cls": len(batch["y"]), "box": batch["has_box"].sum()}


def error_of(rows: list[dict[str, Any]], loss_fn: Any = two_terms, **arguments: Any) -> float:
    batch = {
        "x": torch.stack([row["x"] for row in rows]), "y": torch.tensor([row["y"] for row in rows]),
        "has_box": torch.tensor([row["has_box"] for row in rows]), "box": torch.stack([row["box"] for row in rows]),
    }  # fmt: skip

    def loss_of_all(model: nn.Module) -> Tensor:
        return sum(two_terms(model(batch["x"]), batch).values())

    return update_error(Detector(), rows, loss_of_all, len(rows), loss_fn=loss_fn, **arguments)


RARE = {33, 34, 61}  # of 200: not in the sample before training


@case(8, "`box` only where a batch has boxes")
def box_in_some_rows() -> float:
    return error_of(rows_with_boxes({2, 3, 7}))


@case(8, "the same with `count_items` for both", refused=None)
def box_in_some_rows_counted() -> float:
    return error_of(rows_with_boxes({2, 3, 7}), count_items=counts)


@case(8, "`box` in 3 of 200 rows", refused="'box'")
def box_in_rare_rows() -> float:
    return error_of(rows_with_boxes(RARE, 200))


@case(8, "the same with `count_items` for both, rare", refused=None)
def box_in_rare_rows_counted() -> float:
    return error_of(rows_with_boxes(RARE, 200), count_items=counts)


def counts_what_there_is(batch: dict[str, Tensor]) -> dict[str, Any]:
    found = {"cls": len(batch["y"])}
    return found | ({"box": batch["has_box"].sum()} if batch["has_box"].any() else {})


@case(8, "`count_items` leaves a term out where it has no items", refused=None)
def count_items_leaves_a_term_out() -> float:
    return error_of(rows_with_boxes({2, 3, 7}), count_items=counts_what_there_is)


@case(8, "a term is NaN where it has no items", refused=None)
def nan_without_items() -> float:
    def loss_fn(outputs: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        has_box = batch["has_box"].bool()
        return two_terms(outputs, batch) | {"box": F.smooth_l1_loss(outputs[1][has_box], batch["box"][has_box])}

    return error_of(rows_with_boxes({2, 3, 7}), loss_fn, count_items=counts)


@case(8, "a term is a constant 0 where it has no items", refused=None)
def zero_without_items() -> float:
    def loss_fn(outputs: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"box": torch.zeros(())} | two_terms(outputs, batch)

    return error_of(rows_with_boxes({2, 3, 7}), loss_fn, count_items=counts)


@case(8, "a term is 0 in all rows but rare ones", refused="in 'box', items of some rows weigh more or less")
def zero_but_in_rare_rows() -> float:
    def loss_fn(outputs: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"box": 0 * outputs[1].sum()} | two_terms(outputs, batch)

    return error_of(rows_with_boxes(RARE, 200), loss_fn)


@case(8, "a loss without any term for some rows, which are counted", refused=None)
def no_term_at_all() -> float:
    draw = torch.Generator().manual_seed(3)
    rows = [(torch.randn(5, generator=draw).double(), torch.tensor(n % 3)) for n in range(8)]
    x, y = (torch.stack(column) for column in zip(*rows, strict=True))

    def loss_fn(outputs: Any, targets: Tensor) -> dict[str, Tensor]:
        counted = targets == 2
        if not counted.any():
            return {}
        return {"cls": F.cross_entropy(outputs[0][counted], targets[counted], reduction="sum") / len(targets)}

    return update_error(Detector(), rows, lambda model: loss_fn(model(x), y)["cls"], 8, batch_size=1, loss_fn=loss_fn)


@case(8, "`count_items` counts rows for a term of rows with boxes", refused="'box'")
def a_term_is_missing_where_it_is_counted() -> float:
    return error_of(rows_with_boxes(RARE, 200), count_items=lambda b: {"cls": len(b["y"]), "box": len(b["y"])})


@case(8, "`count_items` never counts a term that `loss_fn` returns", refused="'box'")
def a_term_is_never_counted() -> float:
    return error_of(rows_with_boxes(RARE, 200), count_items=lambda b: {"cls": len(b["y"])})


@case(8, "`count_items` says 0 where a term has a mean", refused="'box'")
def a_term_has_a_mean_over_nothing() -> float:
    return error_of(rows_with_boxes(RARE, 200), count_items=lambda b: {"cls": len(b["y"]), "box": 0})
