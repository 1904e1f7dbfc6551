"""Print the table "model size × cards × what to use" of docs/launching.md, from estimates of memory per process.

No model is loaded: the configs are below.

    .venv/bin/python scripts/memory_table.py
"""

from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, Qwen2Config

from ftaccum.apps.memory.estimate import MemoryEstimate, MemorySetup, estimate_memory
from ftaccum.apps.memory.meta_model import model_of_config

CARDS = {"24 GB": 24, "40 or 48 GB": 40, "80 GB": 80}
NUMBERS_OF_CARDS = (1, 8, 16)
TOKENS = 2048  # of a micro-batch of one row
USABLE = 0.9  # of a card: the rest is for the context of CUDA, and lost to fragmentation
GB = 10**9


def configs() -> dict[str, Any]:
    """Return the configs of Qwen2.5 (0.5B, 1.5B) and Llama 2 (7B, 13B, 70B), by size."""
    qwen = {"vocab_size": 151_936, "num_key_value_heads": 2, "tie_word_embeddings": True}
    llama = {"vocab_size": 32_000}
    return {
        "0.5B": Qwen2Config(
            hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, **qwen
        ),
        "1.5B": Qwen2Config(
            hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, **qwen
        ),
        "7B": LlamaConfig(
            hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32, **llama
        ),
        "13B": LlamaConfig(
            hidden_size=5120, intermediate_size=13_824, num_hidden_layers=40, num_attention_heads=40, **llama
        ),
        "70B": LlamaConfig(
            hidden_size=8192,
            intermediate_size=28_672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            **llama,
        ),
    }


@dataclass(frozen=True)
class Way:
    """A way to train: the type of the weights, how they are held, and whether activations are computed again."""

    dtype: str
    sharded: bool
    checkpointing: bool

    def describe(self, n_cards: int) -> str:
        held = "FSDP2" if self.sharded else "DDP" if n_cards > 1 else "one copy"
        return (
            held + (" + checkpointing" if self.checkpointing else "") + ("" if self.dtype == "float32" else ", 16 bits")
        )

    def estimate(self, model: Any, n_cards: int) -> MemoryEstimate:
        """Return the memory per process with AdamW: bf16 autocast on float32 weights, or float32 sums on 16 bits."""
        is_wide = self.dtype == "float32"
        setup = MemorySetup(
            num_processes=n_cards,
            tokens=TOKENS,
            autocast=is_wide,
            gradient_checkpointing=self.checkpointing,
            accumulate_in_fp32=not is_wide,
        )
        return estimate_memory(model, setup, sharded=self.sharded)


# In the order of preference: float32 weights before 16 bits, whole copies before shards, speed before memory.
WAYS = [
    Way(dtype, sharded, checkpointing)
    for dtype in ("float32", "bfloat16")
    for sharded in (False, True)
    for checkpointing in (False, True)
]


def cell(estimates: dict[Way, MemoryEstimate], n_cards: int, gigabytes: int) -> str:
    """Return the first way that fits on such cards, and its memory."""
    for way, estimate in estimates.items():
        if estimate.total <= USABLE * gigabytes * GB:
            return f"{way.describe(n_cards)}: {estimate.total / GB:.0f} GB"
    return "–"


def table() -> list[str]:
    """Return the lines of the table."""
    lines = [f"| model | cards | {' | '.join(CARDS)} |", f"| --- | --- |{' --- |' * len(CARDS)}"]
    for name, config in configs().items():
        models = {dtype: model_of_config(config, "causal-lm", dtype) for dtype in ("float32", "bfloat16")}
        for n in NUMBERS_OF_CARDS:
            ways = [way for way in WAYS if n > 1 or not way.sharded]
            estimates = {way: way.estimate(models[way.dtype], n) for way in ways}
            cells = (cell(estimates, n, gigabytes) for gigabytes in CARDS.values())
            lines.append(f"| {name} | {n} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
