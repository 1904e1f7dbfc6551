"""Tiny models, a tokenizer and ragged rows for TRL's trainers, and the gradients of their windows."""

import random
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from heads import RecordingOptimizer
from trainers import USUAL

N_ROWS, WINDOW = 11, 8  # rows, and rows of a full window

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


@dataclass(frozen=True)
class Case:
    """A trainer of TRL with its settings.

    Attributes:
        kind: the kind of `rows`.
        settings: further arguments of the configuration.
        has_reference: whether the loss compares with a second model.
        is_exact: whether accumulating this loss can be exact.
    """

    trainer_class: Any
    config_class: Any
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    has_reference: bool = False
    is_exact: bool = True

    def gradients(
        self, trainer_class: Any, *, batch_size: int, k: int, **given: Any
    ) -> tuple[list[dict[str, Tensor]], list[float]]:
        """Train on rows in order for an epoch; return each window's gradient, and the loss that is logged for it.

        Args:
            trainer_class: the trainer, unchanged or exact.
            given: further arguments of the configuration.
        """
        trained = model(reward=self.config_class.__name__ == "RewardConfig")
        optimizer = RecordingOptimizer(trained)
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": k}
        usual = {**USUAL, **sizes, "bf16": False, "gradient_checkpointing": False}
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_class(
                model=trained,
                args=self.config_class(folder, **usual | dict(self.settings) | given),
                train_dataset=rows(self.kind, N_ROWS),
                processing_class=tokenizer(),
                optimizers=(optimizer, LambdaLR(optimizer, lambda _: 1.0)),
                **{"ref_model": model(seed=5)} if self.has_reference else {},
            )
            trainer.train()
        return optimizer.gradients, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def one_batch(self) -> list[dict[str, Tensor]]:
        """Return the gradients of windows of one batch, as the unchanged trainer computes them on one process."""
        return self.gradients(self.trainer_class, batch_size=WINDOW, k=1)[0]


def cases() -> dict[str, Case]:
    """Return trainers of TRL by name."""
    packed = {"packing": True, "max_length": 16}
    mixed = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}
    unpaired = {"loss_type": "apo_zero_unpaired"}
    preference = partial(Case, DPOTrainer, DPOConfig, "pairs", has_reference=True)
    return {
        "SFT": Case(SFTTrainer, SFTConfig, "text"),
        "SFT, completion only": Case(SFTTrainer, SFTConfig, "completion"),
        "SFT, packed": Case(SFTTrainer, SFTConfig, "text", packed),
        "SFT, padding-free": Case(SFTTrainer, SFTConfig, "text", {"padding_free": True, "max_length": None}),
        "DPO": preference(),
        "DPO, ipo": preference({"loss_type": ["ipo"]}),
        "DPO with an SFT term": preference(mixed, is_exact=False),
        "Reward": Case(RewardTrainer, RewardConfig, "pairs"),
        "KTO, apo_zero_unpaired": Case(KTOTrainer, KTOConfig, "labelled", unpaired, has_reference=True),
        "KTO": Case(KTOTrainer, KTOConfig, "labelled", has_reference=True, is_exact=False),
        "ORPO": Case(ORPOTrainer, ORPOConfig, "pairs", is_exact=False),
    }
