"""Models in which some weights get no gradient in some passes, or get it in an unusual way."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from heads import CLASSES, HEADS, N_ROWS, VOCABULARY, Row

RARE = 1  # the first token of the row that takes the rare branch; no other row begins with it


class Branching(nn.Module):
    """A model that sends a row through one of two layers, by its first token. No row uses a third layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, CLASSES)
        self.usual, self.rare, self.never = (nn.Linear(8, 8) for _ in range(3))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        mask_BL1 = attention_mask.unsqueeze(-1)
        hidden_BD = (self.embed(input_ids) * mask_BL1).sum(1) / mask_BL1.sum(1)
        rare_B = input_ids[:, 0] == RARE
        branched_BD = torch.zeros_like(hidden_BD)
        for branch, chosen_B in ((self.usual, ~rare_B), (self.rare, rare_B)):
            if chosen_B.any():
                branched_BD[chosen_B] = branch(hidden_BD[chosen_B]).tanh().to(branched_BD.dtype)
        logits_BC = self.head(branched_BD)
        loss = None if labels is None else nn.functional.cross_entropy(logits_BC, labels)
        return SequenceClassifierOutput(loss, logits_BC)


@dataclass(frozen=True)
class Structure:
    """A model in float64, its rows, and the arguments to test."""

    model: Callable[[], nn.Module]
    rows: Callable[[], list[Row]]
    arguments: Mapping[str, Any] = field(default_factory=dict)


def _rows_of_which_one_is_rare() -> list[Row]:
    rows = HEADS["sequence classification, BERT"].rows(N_ROWS)
    longest = max(
        rows, key=lambda row: len(row["input_ids"])
    )  # never used as a dummy, which is one of the shortest rows
    longest["input_ids"][0] = RARE
    return rows


def _adapted() -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(HEADS["causal LM, Llama"].model(), config)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)  # if it stayed zero, lora_A would have no gradient
    return adapted.double()


def _partly_frozen() -> nn.Module:
    model = HEADS["sequence classification, BERT"].model()
    for part in (model.bert.embeddings, model.bert.encoder.layer[0]):
        part.requires_grad_(False)
    return model


_LLAMA, _GPT2 = HEADS["causal LM, Llama"], HEADS["causal LM, GPT-2"]
STRUCTURES = {
    "conditional branches": Structure(lambda: Branching().double(), _rows_of_which_one_is_rare),
    "adapters": Structure(_adapted, _LLAMA.rows),
    "frozen weights": Structure(_partly_frozen, HEADS["sequence classification, BERT"].rows),
    "tied weights": Structure(_GPT2.model, _GPT2.rows),
    "gradient checkpointing": Structure(_LLAMA.model, _LLAMA.rows, {"gradient_checkpointing": True}),
}


def with_a_narrow_weight(model: nn.Module) -> nn.Module:
    """Add a bfloat16 weight to the model that adds 0 to its loss.

    `accumulate_in_fp32` then sums all gradients, and rounds none of the others."""
    model.register_parameter("narrow", nn.Parameter(torch.ones(2, dtype=torch.bfloat16)))

    def add(_: nn.Module, __: Any, outputs: Any) -> None:
        if outputs.loss is not None:
            outputs.loss = outputs.loss + 0 * model.narrow.sum()

    model.register_forward_hook(add)
    return model
