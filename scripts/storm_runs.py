"""The runs of the storm: small ones, with everything that a checkpoint could forget.

Each takes seconds. They have dropout, batch norm, a buffer outside of the `state_dict`, rows that change each time they
are read, a remainder carried over the end of an epoch, growing updates, a gradient scaler, and a stream.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, EvalPrediction

from ftaccum import test_fine_tuning
from ftaccum.runtime.sharding.tensors import local_part
from ftaccum.runtime.state_guards import seed_all

N_ROWS, VOCABULARY, CLASSES, LONGEST = 120, 50, 3, 20
TIMES = {
    "training_time",
    "samples_per_second",
    "tokens_per_second",
}  # times and rates, which differ between any two runs

Row = dict[str, Any]


class Wavering(nn.Module):
    """A classifier with batch norm, dropout, and a running mean of its inputs outside of the `state_dict`."""

    level: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 16)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.2)
        self.classes = nn.Linear(16, CLASSES)
        self.register_buffer("level", torch.zeros(16), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, noise: Tensor, labels: Tensor) -> dict[str, Tensor]:
        mask_BT1 = attention_mask[..., None].to(self.level.dtype)
        mean_BD = (self.words(input_ids) * mask_BT1).sum(1) / mask_BT1.sum(1)
        if self.training:
            with torch.no_grad():
                self.level.lerp_(mean_BD.mean(0), 0.1)
        hidden_BD = self.norm(mean_BD - self.level + 0.1 * noise[:, None])
        logits_BC = self.classes(self.dropout(hidden_BD))
        return {"loss": nn.functional.cross_entropy(logits_BC, labels), "logits": logits_BC}


class NoisyRows(Dataset[Row]):
    """Rows of different lengths, with noise drawn anew at each read, from three generators in turn."""

    def __len__(self) -> int:
        return N_ROWS

    def __getitem__(self, index: int) -> Row:
        noise = (torch.randn(()).item(), float(np.random.normal()), random.gauss(0, 1))[index % 3]
        return row(index) | {"noise": noise}


@dataclass(frozen=True)
class Kind:
    """A kind of run: its model, rows and settings."""

    model: Callable[[], nn.Module]
    settings: Callable[[], dict[str, Any]]
    takes_workers: bool = True


def row(index: int) -> Row:
    """Return a row of random length in which some tokens indicate the class."""
    draw = random.Random(index)
    label = draw.randrange(CLASSES)
    length = draw.randint(3, LONGEST)
    return {"input_ids": [1 + label if draw.random() < 0.5 else draw.randrange(1, VOCABULARY) for _ in range(length)],
            "labels": label}  # fmt: skip


def stream() -> Iterator[Row]:
    yield from map(row, range(N_ROWS))


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, axis=-1) == prediction.label_ids))}


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(
        BertConfig(vocab_size=VOCABULARY, max_position_embeddings=LONGEST, num_labels=CLASSES, **sizes)
    )


KINDS = {
    "carried": Kind(
        Wavering, lambda: {"train_data": NoisyRows(), "remainder": "carry", "gradient_accumulation_steps": 3}
    ),
    "growing": Kind(
        bert,
        lambda: {
            "train_data": list(map(row, range(N_ROWS))),
            "gradient_accumulation_steps": "0:1,8:2,20:3",
            "learning_rate_scaling": "sqrt",
            "mixed_precision": "fp16",
            "compute_metrics": accuracy,
        },
    ),
    "sharded": Kind(
        bert,
        lambda: {"train_data": list(map(row, range(N_ROWS))), "gradient_accumulation_steps": 2, "sharding": "fsdp2"},
    ),
    "stream": Kind(
        bert,
        lambda: {
            "train_data": IterableDataset.from_generator(stream).shuffle(seed=3, buffer_size=40),
            "val_data": list(map(row, range(N_ROWS, N_ROWS + 20))),
            "max_updates": 36,
            "gradient_accumulation_steps": 2,
        },
        takes_workers=False,
    ),
}


def train(kind: Kind, folder: Path, *, rank: int, workers: int, born: int) -> None:
    """Start or resume a run. Each process writes its final weights and numbers to `folder`.

    Args:
        workers: number of processes that collate.
        born: seed of the model's initial weights and the process's generators. A resumed run must not depend on it.
    """
    seed_all(born)
    model = kind.model()
    result = test_fine_tuning(
        model, n_epochs=3, batch_size=4, learning_rate=3e-3, lr_scheduler="cosine", warmup_steps=5,
        restore_best_weights=True, on_inexact="ignore", num_workers=workers if kind.takes_workers else 0,
        output_dir=str(folder / "outputs"), checkpoint_every=3, resume="auto", progress=False,
        **{"validation_split": 0.15, **kind.settings()},
    )  # fmt: skip
    audits = [audit | {"seconds": 0} for audit in result.audits]
    values = {**result, "audits": audits}.items()
    numbers = {name: repr(value) for name, value in values if name not in TIMES | {"output_dir"}}
    tensors = {name: _checksum(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    (folder / f"came-to.{rank}.json").write_text(json.dumps({"numbers": numbers, "weights": tensors}))


@dataclass(frozen=True)
class Differences:
    """How many weights, ledger entries and numbers of the result differ in any bit, over all processes."""

    weights: int = 0
    entries: int = 0
    numbers: int = 0

    @classmethod
    def between(cls, one: Path, other: Path, processes: int) -> "Differences":
        """Args:
        one, other: folders of two finished runs.
        """
        n_weights = n_numbers = 0
        for rank in range(processes):
            first, second = (json.loads((folder / f"came-to.{rank}.json").read_text()) for folder in (one, other))
            n_weights += _n_unlike(first["weights"], second["weights"])
            n_numbers += _n_unlike(first["numbers"], second["numbers"])
        lines, others = (_lines(folder / "outputs" / "ledger.jsonl") for folder in (one, other))
        n_entries = _n_unlike(dict(enumerate(lines)), dict(enumerate(others)))
        return cls(n_weights, n_entries, n_numbers)

    def __add__(self, other: "Differences") -> "Differences":
        return Differences(self.weights + other.weights, self.entries + other.entries, self.numbers + other.numbers)


def _lines(ledger: Path) -> list[str]:
    """Return the lines of a ledger without times and memory, which differ between any two runs."""
    return [re.sub(r', "(\w*seconds|peak_memory)": [^,}]*', "", line) for line in ledger.read_text().splitlines()]


def _n_unlike(one: dict[Any, str], other: dict[Any, str]) -> int:
    return sum(one.get(name) != other.get(name) for name in one.keys() | other.keys())


def _checksum(tensor: Tensor) -> str:
    return hashlib.sha256(local_part(tensor.detach()).contiguous().cpu().numpy().tobytes()).hexdigest()
