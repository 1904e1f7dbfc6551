"""Workloads of the benchmarks: models, and real rows from Python packages (recipes/packaged)."""

import copy
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))

from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

import packaged
from packaged.chats import CHATS_FILE, CHATS_PACKAGE
from packaged.files import unpacked, write_lines

Row = dict[str, Any]

_CONVERSATIONS = packaged.CACHE / "chitchat_texts.jsonl"
_VOCABULARY, _LONGEST = 4096, 1024


@dataclass(frozen=True)
class Workload:
    """A model and its rows.

    Attributes:
        model: model with its initial weights, which is never trained itself.
        rows: tokenized rows, in an order that depends on the seed.
        collate: pads rows to a batch, as in Transformers' documentation for this task.
        n_items: returns the number of loss items of rows.
        updates, batch_size, k, precision: defaults of a timed run: number of updates, rows per micro-batch,
            micro-batches per update, and "no" for float32 or "bf16" for autocast.
        tokenizer: for conversations, the tokenizer with the chat template.
    """

    name: str
    model: Any
    rows: Dataset
    collate: Callable[[list[Row]], dict[str, Any]]
    n_items: Callable[[Sequence[Row]], int]
    updates: int
    batch_size: int = 8
    k: int = 8
    precision: str = "no"
    tokenizer: Any = None

    def new_model(self) -> Any:
        return copy.deepcopy(self.model)


def movies(seed: int) -> Workload:
    """Return MiniLM (22.7M parameters) with a new head for two classes, and short film reviews of similar lengths."""
    packaged.prepare(packaged.MINILM, packaged.MOVIES_TRAIN)
    tokenizer = AutoTokenizer.from_pretrained(packaged.MINILM)
    rows = Dataset.from_csv(str(packaged.MOVIES_TRAIN)).rename_column("label", "labels")
    rows = rows.map(lambda row: tokenizer(row["text"], truncation=True), remove_columns=["text"])
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(packaged.MINILM, num_labels=2)
    return Workload("movies", model, rows.shuffle(seed), DataCollatorWithPadding(tokenizer), len, updates=6)


def long_tailed(seed: int) -> Workload:
    """Return a Llama of 2 × 128 with random weights, and conversations of 3 to 1,024 tokens, half under 61."""
    tokenizer = AutoTokenizer.from_pretrained(_minilm())
    rows = conversations(tokenizer)
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=_LONGEST, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    collate = DataCollatorForSeq2Seq(tokenizer)
    return Workload("long-tailed", LlamaForCausalLM(config), rows.shuffle(seed), collate, n_targets, updates=3)


def equal_lengths(seed: int, length: int) -> Workload:
    """Return the model of `long_tailed`, and conversations that are all cut to one length."""
    workload = long_tailed(seed)
    rows = workload.rows.filter(lambda row: len(row["input_ids"]) >= length)
    rows = rows.map(lambda row: {name: values[:length] for name, values in row.items()})
    return Workload("equal lengths", workload.model, rows, workload.collate, n_targets, updates=0)


WORKLOADS: dict[str, Callable[[int], Workload]] = {"movies": movies, "long-tailed": long_tailed}


def conversations(tokenizer: Any) -> Dataset:
    """Return each conversation as a row of token ids, which are also the labels.

    The tokenizer's 30,522 ids are mapped to 4,096. With random weights the ids have no meaning, and a larger output
    layer would dominate the cost of a small model. Padding keeps id 0.
    """
    texts = [json.loads(line) for line in _texts().read_text(encoding="utf-8").splitlines()]
    encoded = tokenizer(texts, truncation=True, max_length=_LONGEST)["input_ids"]
    ids = [[1 + n % (_VOCABULARY - 1) for n in row] for row in encoded]
    masks = [[1] * len(row) for row in ids]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": masks, "labels": ids})


def n_targets(rows: Sequence[Row]) -> int:
    """Return the number of tokens that a causal LM predicts: all except the first of each row."""
    return sum(len(row["labels"]) - 1 for row in rows)


def _minilm() -> Path:
    packaged.prepare(packaged.MINILM)
    return packaged.MINILM


def _texts() -> Path:
    """Return a file with the text of each conversation, one JSON string per line, including short conversations."""
    if not _CONVERSATIONS.exists():
        with unpacked(CHATS_PACKAGE, megabytes=8) as folder:
            raw = json.loads((folder / CHATS_FILE).read_text(encoding="utf-8"))
        texts = ["\n".join(line["text"] for line in itertools.chain(*chat["messages"])) for chat in raw.values()]
        write_lines(_CONVERSATIONS, (json.dumps(text) for text in texts if text.strip()))
    return _CONVERSATIONS
