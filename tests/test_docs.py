"""Run the Python blocks of the docs, each with a tiny model and rows in place of the reader's."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import Trainer, TrainingArguments, default_data_collator

import ftaccum
from ftaccum.runtime.accelerator import fresh_accelerate_state
from ftaccum.tasks.load import Loaded
from silent_errors.text_columns import LABELS, REVIEWS, causal_lm, classifier, word_tokenizer
from silent_errors.tokenizer_padding import CLASSIFIED, TOKENS
from test_readme import PAGES, README, blocks

BLOCKS = [
    pytest.param(
        block, id=f"{page.name}, block {n}", marks=[pytest.mark.slow] if re.search("n_trials|n_epochs=5", block) else []
    )
    for page in PAGES
    for n, block in enumerate(blocks(page, "python"), 1)
    # Blocks with "argparse" are whole scripts, which test_port.py runs; W&B is not installed with the tested versions.
    if page != README and "argparse" not in block and "use_wandb" not in block
]


def common() -> dict[str, Any]:
    """Return the names that every block may use."""
    return {
        "ftaccum": ftaccum,
        "test_fine_tuning": ftaccum.test_fine_tuning,
        "torch": torch,
        "model": classifier(),
        "make_model": classifier,
        "tokenizer": word_tokenizer(),
        "rows": CLASSIFIED,
    }


class TwoTasks(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.kind, self.price = torch.nn.Embedding(9, 4), torch.nn.Linear(6, 3), torch.nn.Linear(6, 1)

    def forward(self, ids: torch.Tensor, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        found = torch.cat([self.embedding(ids).mean(1), numbers], dim=1)
        return {"kind": self.kind(found), "price": self.price(found)[:, 0]}


def two_tasks() -> dict[str, Any]:
    net, draw = TwoTasks(), torch.Generator().manual_seed(0)
    kinds = [torch.tensor([n % 3, -100 if n % 2 else 1]) for n in range(8)]
    loader = [
        {
            "ids": torch.randint(9, (2, 5), generator=draw),
            "numbers": torch.randn(2, 2, generator=draw),
            "kind": kind,
            "price": torch.randn(2, generator=draw),
        }
        for kind in kinds
    ]
    return {"net": net, "loader": loader, "optimizer": torch.optim.SGD(net.parameters(), lr=0.1)}


def token_rows() -> dict[str, Any]:
    return {"model": causal_lm(), "rows": TOKENS}


def pairs() -> dict[str, Any]:
    columns = {"sentence": REVIEWS, "premise": REVIEWS, "hypothesis": REVIEWS[::-1], "label": LABELS}
    return {"rows": Dataset.from_dict(columns)}


def weighted_loss() -> dict[str, Any]:
    weight = torch.tensor([1.0, 3.0], dtype=torch.float64)
    return {
        "model": torch.nn.Linear(3, 2),
        "rows": [{"input": torch.randn(3), "labels": n % 2} for n in range(8)],
        "weight": weight,
        "my_loss": lambda outputs, batch: F.cross_entropy(outputs, batch["labels"], weight=weight.to(outputs.dtype)),
    }


def hub_stream() -> dict[str, Any]:
    """Return seven sentences in place of the data that a block streams from the hub."""
    rows = Dataset.from_dict({"text": REVIEWS})
    return {
        "model": causal_lm(),
        "val_rows": rows,
        "load_dataset": lambda *_names, streaming, **_options: rows.to_iterable_dataset() if streaming else rows,
    }


def text_files() -> dict[str, Any]:
    """Return a function that loads a tiny model and rows in place of the named ones."""
    rows = Dataset.from_dict({"text": REVIEWS, "label": LABELS})
    loaded = Loaded(classifier(), word_tokenizer(), rows, None, None, classifier)
    run = ftaccum.test_fine_tuning
    return {"ftaccum": SimpleNamespace(test_fine_tuning=run, load_task=lambda *_, **__: loaded, F1=ftaccum.F1)}


def csv_file() -> dict[str, Any]:
    """Write the file that a block reads."""
    Path("train.csv").write_text("text,label\ngood,1\n", encoding="utf-8")
    return {}


def answers() -> dict[str, Any]:
    """Return a causal LM and rows of prompts and answers."""
    rows = [{"input_ids": [3, 4, n, 2], "labels": [-100, -100, n, 2]} for n in range(5, 12)]
    return {"model": causal_lm(), "prompts_and_answers": rows}


def loop() -> dict[str, Any]:
    """Return the parts of a hand-written loop: a model and a loader of rows, or a module and a loader of pairs."""
    model, net = causal_lm(), torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD([*model.parameters(), *net.parameters()], lr=0.1)
    return {
        "model": model,
        "net": net,
        "k": 2,
        "loader": torch.utils.data.DataLoader([{**row, "labels": row["input_ids"]} for row in EQUAL], batch_size=2),
        "pairs": [(torch.randn(2, 3), torch.tensor([0, 1]))] * 6,
        "optimizer": optimizer,
        "scaler": torch.amp.GradScaler("cpu"),
        "device": "cpu",
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
    }


def trainer() -> dict[str, Any]:
    """Return the parts of a Trainer."""
    args = TrainingArguments("trained", max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no")
    rows = [{"input_ids": torch.arange(n, n + 3), "labels": n % 2} for n in range(1, 9)]
    return {"Trainer": Trainer, "args": args, "rows": rows, "collate": default_data_collator}


EQUAL = [{"input_ids": torch.arange(n, n + 4)} for n in range(1, 6)]

# Further names that a block may use, by a text that occurs in the block.
NAMES: Mapping[str, Callable[[], dict[str, Any]]] = {
    "premise": pairs,
    "my_loss": weighted_loss,
    "prompts_and_answers": answers,
    "streaming=True": hub_stream,
    'resume="auto"\n)': token_rows,
    "accumulation_steps=[(0, 2)": token_rows,
    "exact": trainer,
    "Accelerator(": loop,
    "ExactAccumulation(": loop,
    'outputs["price"]': two_tasks,
    "optim.SGD": token_rows,
    "next_token_accuracy": token_rows,
    "verify": token_rows,
    "load_task": text_files,
    "read_rows": csv_file,
    '"q_proj"': token_rows,
    "search": token_rows,
    "trial.suggest": token_rows,
}


def test_the_docs_have_python_blocks() -> None:
    assert len(BLOCKS) >= 10


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if "ftaccum.exact" in block and not hasattr(Trainer, "loss_is_scaled_for_ga"):
        pytest.skip("`exact` needs a newer version of Transformers")
    monkeypatch.chdir(tmp_path)
    names = common()
    for text, more in NAMES.items():
        if text in block:
            names |= more()
    if "make_model" in block:
        names["make_model"] = causal_lm
    with fresh_accelerate_state():
        exec(compile(block, "docs", "exec"), names)
