"""Optimizers with other weights for evaluation and saving than for training."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from schedule_free import ScheduleFreeSGD

from .case import case
from .rates import distance, regression, train, train_plainly


def made(groups: Any) -> ScheduleFreeSGD:
    optimizer = ScheduleFreeSGD([p for group in groups for p in group["params"]], lr=0.5, beta=0.8)
    optimizer.train()
    return optimizer


def references() -> tuple[nn.Module, list[Any], nn.Module]:
    """Return a model, its rows, and the model after training with a schedule-free optimizer in plain PyTorch."""
    model, rows = regression()
    reference = copy.deepcopy(model)
    optimizer = made([{"params": reference.parameters()}])
    train_plainly(reference, rows, optimizer)
    optimizer.eval()
    return model, rows, reference


@case(14, "the model that a schedule-free optimizer returns")
def returned_model() -> float:
    model, rows, reference = references()
    start = copy.deepcopy(model)
    train(model, rows, made)
    return distance(model, reference, start)


@case(14, "`model/` and the last checkpoint of a schedule-free optimizer")
def saved_model() -> float:
    model, rows, reference = references()
    with tempfile.TemporaryDirectory() as folder:
        train(model, rows, made, output_dir=folder)
        paths = [next(Path(folder).glob(f"{where}/model.safetensors")) for where in ("model", "checkpoints/*3/model")]
        saved = [load_file(path) for path in paths]
    names = dict(reference.named_parameters())
    return max(
        float((weights[name] - p).detach().norm() / p.detach().norm()) for weights in saved for name, p in names.items()
    )


@case(14, "the validation loss under a schedule-free optimizer")
def validation_loss() -> float:
    model, rows, reference = references()
    result = train(model, rows, made, val_data=rows)
    inputs, targets = (torch.stack(column) for column in zip(*rows, strict=True))
    wanted = nn.functional.mse_loss(reference(inputs), targets).item()
    return abs(result.final_loss - wanted) / wanted


@case(14, "the weights of the best epoch under a schedule-free optimizer")
def best_weights() -> float:
    model, rows, reference = references()
    start = copy.deepcopy(model)
    train(
        model,
        rows,
        made,
        val_data=rows,
        restore_best_weights=True,
    )
    return distance(model, reference, start)
