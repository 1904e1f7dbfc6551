"""Workloads of scripts/bench_trainer.py that label only some of their positions: a masked LM, and answers of chats."""

import itertools
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    set_seed,
)

import packaged
from ftaccum import load_task
from packaged.files import write_lines
from workloads import Row, Workload

_IGNORED, _MASKED = -100, 0.15
_CHATS, _MORE_ANSWERS, _LONGEST = 640, 3.0, 512


def masked_lm(seed: int) -> Workload:
    """Return MiniLM as a masked LM (22.8M parameters, the output embedding tied), and sentences of film reviews.

    The head is new, except for the embedding. The seed masks 15% of the tokens of each row, at least one, once for all
    contenders: collators that mask each batch anew would give every contender other tokens, and another amount of work.
    """
    packaged.prepare(packaged.MINILM, packaged.MOVIES_TRAIN)
    tokenizer = AutoTokenizer.from_pretrained(packaged.MINILM)
    mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=_MASKED)

    def encode(row: Row) -> Row:
        encoded = tokenizer(row["text"], truncation=True)
        while True:
            masked = mask([encoded])
            if (masked["labels"] != _IGNORED).any():
                ids, labels = (masked[name][0].tolist() for name in ("input_ids", "labels"))
                return {**encoded, "input_ids": ids, "labels": labels}

    set_seed(seed)
    texts = Dataset.from_csv(str(packaged.MOVIES_TRAIN))
    rows = texts.map(encode, remove_columns=texts.column_names, load_from_cache_file=False)
    model = AutoModelForMaskedLM.from_pretrained(packaged.MINILM)
    collate = DataCollatorForTokenClassification(tokenizer)  # pads labels with -100
    return Workload("masked-lm", model, rows.shuffle(seed), collate, _n_labels, updates=8)


def chat(seed: int) -> Workload:
    """Return SmolLM2-135M-Instruct, and conversations of up to 512 tokens, half under 130, with labelled answers.

    Each conversation ends after one answer or a few, drawn by the seed; longer ones are cut at 512 tokens. All answers
    are labelled. On a CPU with bf16 units, autocast (the default of TRL's SFTTrainer) is 1.7 times as fast as float32,
    and bf16 weights 1.06 times as fast as autocast; so the workload uses autocast, in which AdamW's small steps are not
    rounded away.
    """
    packaged.prepare(packaged.SMOLLM, packaged.CHATS_TRAIN)
    rows = load_task(
        "chat", str(packaged.SMOLLM), str(_started_chats(seed)), max_length=_LONGEST, validation_split=0.0
    ).train
    rows = rows.map(lambda row: {"attention_mask": [1] * len(row["input_ids"])})
    tokenizer = AutoTokenizer.from_pretrained(packaged.SMOLLM)
    model = AutoModelForCausalLM.from_pretrained(packaged.SMOLLM)
    return Workload(
        "chat", model, rows, DataCollatorForSeq2Seq(tokenizer), _n_targets, updates=3, batch_size=4, k=4,
        precision="bf16", tokenizer=tokenizer,
    )  # fmt: skip


PARTLY_LABELLED: dict[str, Callable[[int], Workload]] = {"masked-lm": masked_lm, "chat": chat}


def _started_chats(seed: int) -> Any:
    """Return a file with the first exchanges of some conversations, in an order that depends on the seed."""
    draw = random.Random(seed)
    lines = packaged.CHATS_TRAIN.read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in draw.sample(lines, _CHATS)]
    path = packaged.CACHE / f"chitchat_starts_{seed}.jsonl"
    starts = [messages[: 2 * (1 + int(draw.expovariate(1 / _MORE_ANSWERS)))] for messages in chats]
    write_lines(path, (json.dumps({"messages": messages}) for messages in starts))
    return path


def _n_labels(rows: Sequence[Row]) -> int:
    return sum(label != _IGNORED for row in rows for label in row["labels"])


def _n_targets(rows: Sequence[Row]) -> int:
    """Return the number of labels that a causal LM predicts: nothing predicts the first token of a row."""
    return sum(label != _IGNORED for row in rows for label in itertools.islice(row["labels"], 1, None))
