"""Runs that sharding must not change, by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration
from transformers.modeling_outputs import SequenceClassifierOutput

from heads import _BART, HEADS, Row
from sharded_runs import Case
from skipping import Skipping, Unused
from structures import STRUCTURES

_LLAMA, _GPT2, _T5 = HEADS["causal LM, Llama"], HEADS["causal LM, GPT-2"], HEADS["seq2seq, T5"]
_BERT, _BART_ROWS = HEADS["sequence classification, BERT"], HEADS["seq2seq, BART"].rows
FLOAT32 = 1e-5  # the tolerance of runs in float32


class Scaling(nn.Module):
    """A classifier whose logits are multiplied by a trained scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = _BERT.model(), nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.config = self.inner.config

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        logits_BC = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits * self.scale
        loss = None if labels is None else nn.functional.cross_entropy(logits_BC, labels)
        return SequenceClassifierOutput(loss, logits_BC)


class Poisoned(Skipping):
    """A model that returns an infinite loss for rows of one first token, in which it also skips a block."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        outputs = super().forward(input_ids, attention_mask, labels)
        if outputs.loss is not None and (input_ids[:, 0] == POISON).any():
            outputs.loss = outputs.loss * torch.inf
        return outputs


POISON, POISONED_ROW = 60, 3


def poisoned_rows() -> list[Row]:
    rows = [{**row, "input_ids": [1, *row["input_ids"][1:]]} for row in _BERT.rows()]
    rows[POISONED_ROW]["input_ids"][0] = POISON
    return rows


def in_precision(make: Callable[[], nn.Module], dtype: torch.dtype) -> Callable[[], nn.Module]:
    return lambda: make().to(dtype)


def adapted(base: torch.dtype) -> nn.Module:
    """Return Llama with float32 adapters on a frozen base."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(_LLAMA.model().to(base), config, autocast_adapter_dtype=True)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)  # if it stayed zero, lora_A would have no gradient
    return model


def dropping_layers() -> nn.Module:
    torch.manual_seed(0)
    return BartForConditionalGeneration(BartConfig(**_BART, encoder_layerdrop=0.5)).double()


def _of_each_process() -> nn.Module:
    model = _BERT.model()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + PartialState().process_index)
    return model


def prompts() -> list[Row]:
    """Return rows that begin with tokens that do not count: the prompts to continue."""
    return [row for row in _LLAMA.rows(40) if row["labels"][0] == -100][:9]


def token_sums(prediction: Any) -> dict[str, float]:
    """Return a number that changes with any generated token."""
    ids = torch.as_tensor(prediction.predictions).clamp(min=0).double()
    return {"sum": float((ids * torch.arange(1, 1 + ids.shape[1])).sum())}


def _adam_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)


_adam_of.of_model = True  # type: ignore[attr-defined]
_GENERATES = {"compute_metrics": token_sums, "generation_kwargs": {"max_new_tokens": 5}}
_WIDE = {"batch_size": 4, "effective_batch_size": 7}

STRUCTURED = {
    "Llama": Case(_LLAMA.model, _LLAMA.rows),
    "Llama, synced at the end": Case(_LLAMA.model, _LLAMA.rows, {"sync": "last"}),
    "GPT-2 with tied weights": Case(_GPT2.model, _GPT2.rows),
    "T5": Case(_T5.model, _T5.rows),
    "adapters": Case(STRUCTURES["adapters"].model, _LLAMA.rows),
    "added adapters": Case(_LLAMA.model, _LLAMA.rows, {"lora": {"r": 2}}),
    "frozen parts": Case(STRUCTURES["frozen weights"].model, _BERT.rows),
    "gradient checkpointing": Case(_LLAMA.model, _LLAMA.rows, {"gradient_checkpointing": True}),
    "a scalar": Case(Scaling, _BERT.rows),
    "skipped blocks": Case(lambda: Skipping().double(), _BERT.rows),
    "an unused block": Case(lambda: Unused().double(), _BERT.rows, {"weight_decay": 0.1}),
    "conditional branches": Case(
        STRUCTURES["conditional branches"].model, STRUCTURES["conditional branches"].rows, {"weight_decay": 0.1}
    ),
    "other weights on the second process": Case(_of_each_process, _BERT.rows),
    "dropped layers": Case(dropping_layers, _BART_ROWS, {"audit": False, "n_epochs": 4}),
}
PLANNED = {
    "padding_free": Case(_LLAMA.model, _LLAMA.rows, {"padding_free": True, "batch_size": 2}),
    "max_tokens": Case(_LLAMA.model, _LLAMA.rows, {"max_tokens": "auto", **_WIDE}),
    "batch_size='auto'": Case(_LLAMA.model, _LLAMA.rows, {"batch_size": "auto", "effective_batch_size": 4}),
    "evaluate_every": Case(_LLAMA.model, _LLAMA.rows, {"evaluate_every": 1, "eval_batch_size": 2}),
    # The first evaluation has the larger number.
    "restore_best_weights": Case(
        _T5.model,
        _T5.rows,
        {**_GENERATES, "restore_best_weights": True, "metric_for_best": "sum", "greater_is_better": True},
    ),
}
GENERATING = {
    "texts of T5": Case(_T5.model, _T5.rows, _GENERATES),
    "texts of Llama": Case(_LLAMA.model, prompts, _GENERATES),
    "texts of adapters": Case(STRUCTURES["adapters"].model, prompts, _GENERATES),
}
OPTIMIZERS = {
    "an optimizer of the user": Case(_LLAMA.model, _LLAMA.rows, {"optimizer": _adam_of}),
    **{
        f"optimizer={name!r}": Case(_LLAMA.model, _LLAMA.rows, {"optimizer": name, "audit": False})
        for name in ("adamw", "sgd", "lion", "schedule_free_adamw")
    },
    # Muon multiplies matrices in bfloat16.
    "optimizer='muon'": Case(_LLAMA.model, _LLAMA.rows, {"optimizer": "muon", "audit": False}, tolerance=2e-4),
}
PRECISIONS = {
    "bf16 autocast": Case(
        in_precision(_LLAMA.model, torch.float32),
        _LLAMA.rows,
        {"mixed_precision": "bf16"},
        tolerance=FLOAT32,
        of_audits=1e-2,
    ),
    "fp16 autocast": Case(
        in_precision(_LLAMA.model, torch.float32),
        _LLAMA.rows,
        {"mixed_precision": "fp16"},
        tolerance=FLOAT32,
        of_audits=1e-3,
    ),
    "adapters on a bf16 base": Case(partial(adapted, torch.bfloat16), _LLAMA.rows, tolerance=FLOAT32),
    "adapters on a float32 base": Case(partial(adapted, torch.float32), _LLAMA.rows, tolerance=FLOAT32),
}
COMPILED = {
    "compile": Case(in_precision(_LLAMA.model, torch.float32), _LLAMA.rows, {"compile": True}, tolerance=FLOAT32)
}
CASES = STRUCTURED | PLANNED | GENERATING | OPTIMIZERS | PRECISIONS | COMPILED
