"""What one start of processes does, and the models and rows that it does it with."""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

Row = dict[str, list[int]]

TINY, MID = "tiny", "mid-size"
CONFIGS = {
    TINY: {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    },
    # 254 million weights
    MID: {
        "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 2048,
    },
}  # fmt: skip

WHOLE, EACH, LAST = "DDP", "FSDP2, each", "FSDP2, last"
WAYS: dict[str, dict[str, Any]] = {
    WHOLE: {"sharding": "off"},
    EACH: {"sharding": "fsdp2", "sync": "each"},
    LAST: {"sharding": "fsdp2", "sync": "last"},
}
ONE_COPY = "one copy"


@dataclass(frozen=True)
class Job:
    """What each of several processes runs.

    Attributes:
        part: the name of the part.
        folder: where processes write their results.
        num_processes: the number of processes.
        model: "tiny", "mid-size", or the name of a real model.
        batch_size, length: rows of a micro-batch, and tokens of a row, for memory and speed.
        seconds: the time that the part may take.
        way, names, stops_after: for `resume`: the way to train, the names of the runs, and the update after which a run
            waits to be killed; 0 to train to the end.
    """

    part: str
    folder: str
    num_processes: int
    model: str = TINY
    batch_size: int = 2
    length: int = 32
    seconds: float = 120.0
    way: str = WHOLE
    names: tuple[str, ...] = ()
    stops_after: int = 0

    @property
    def ways(self) -> dict[str, dict[str, Any]]:
        return WAYS if self.num_processes > 1 else {ONE_COPY: {}}

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, file: Path) -> "Job":
        read = json.loads(file.read_text())
        return cls(**{**read, "names": tuple(read["names"])})


def new_model(name: str) -> Any:
    """Return a model with float32 weights: random ones, equal on all processes, or those of a real model."""
    if name not in CONFIGS:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    torch.manual_seed(0)
    return LlamaForCausalLM(config_of(name))


def config_of(name: str) -> Any:
    if name not in CONFIGS:
        return AutoConfig.from_pretrained(name)
    return LlamaConfig(**CONFIGS[name], architectures=["LlamaForCausalLM"])


def rows_of(vocabulary: int, n_rows: int, longest: int, *, shortest: int | None = None) -> list[Row]:
    """Return rows of random tokens. Those of unequal lengths also have unequal shares of labels."""
    draw, rows = random.Random(0), []
    for _ in range(n_rows):
        ids = [draw.randrange(1, vocabulary) for _ in range(draw.randint(shortest or longest, longest))]
        n_ignored = draw.randint(0, len(ids) // 2) if shortest else 0
        rows.append({"input_ids": ids, "labels": [-100] * n_ignored + ids[n_ignored:]})
    return rows


def accelerator() -> torch.device | None:
    """Return the kind of GPU that this machine has, or None."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
