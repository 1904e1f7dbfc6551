"""Tiny models, a tokenizer and ragged rows for TRL's trainers, and the gradients of their windows."""

import random
import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from heads import RecordingOptimizer

WORDS = [f"w{n}" for n in range(50)]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: n for n, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def model(*, reward: bool = False, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        num_labels=1,
    )
    return (LlamaForSequenceClassification if reward else LlamaForCausalLM)(config)


def rows(kind: str, n: int) -> Dataset:
    """Return ragged rows: "text", "completion" (prompt and completion), "pairs" or "labelled"."""
    draw = random.Random(3)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    made: list[dict[str, Any]] = []
    for index in range(n):
        prompt, good, bad = words(1, 6), " " + words(1, 9), " " + words(1, 9)
        made.append(
            {
                "text": {"text": prompt + good},
                "completion": {"prompt": prompt, "completion": good},
                "pairs": {"prompt": prompt, "chosen": good, "rejected": bad},
                "labelled": {"prompt": prompt, "completion": good, "label": index % 3 != 1},
            }[kind]
        )
    return Dataset.from_list(made)


def gradients(
    trainer_class: Any,
    config_class: Any,
    of_model: nn.Module,
    data: Dataset,
    *,
    parts: dict[str, Any] | None = None,
    **given: Any,
) -> tuple[list[dict[str, Tensor]], list[float]]:
    """Train for an epoch; return the gradient of each window and the loss that is logged for it.

    Args:
        parts: arguments of the trainer.
        given: arguments of its configuration.
    """
    optimizer = RecordingOptimizer(of_model)
    usual: dict[str, Any] = {
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=of_model,
            args=config_class(folder, **usual | given),
            train_dataset=data,
            processing_class=tokenizer(),
            optimizers=(optimizer, LambdaLR(optimizer, lambda _: 1.0)),
            **parts or {},
        )
        trainer.train()
    return optimizer.gradients, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
