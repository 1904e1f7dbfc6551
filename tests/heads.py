"""Tiny models of every kind of head, ragged rows for them, and the gradient of one batch of rows in plain PyTorch.

Nothing here uses ftaccum: it is the reference for ftaccum.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY, CLASSES, PAD, IGNORED = 61, 3, 0, -100
N_ROWS = 9

Row = dict[str, Any]

_SIZE = {"vocab_size": VOCABULARY, "pad_token_id": PAD}
_BERT = _SIZE | {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_DISTILBERT = _SIZE | {
    "dim": 16,
    "hidden_dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0,
}
_LLAMA = _SIZE | {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT2 = _SIZE | {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5 = _SIZE | {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": PAD,
}
_BART = _SIZE | {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "decoder_start_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": None,
}
_VIT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def _ids(draw: torch.Generator, longest: int = 12) -> list[int]:
    length = int(torch.randint(3, longest + 1, (1,), generator=draw))
    return torch.randint(3, VOCABULARY, (length,), generator=draw).tolist()


def _number(draw: torch.Generator, below: int) -> int:
    return int(torch.randint(below, (1,), generator=draw))


def _next_token(draw: torch.Generator) -> Row:
    ids = _ids(draw)
    prompt = _number(draw, len(ids) - 1)  # 0: the first label counts, which only a head that shifts ignores
    return {"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]}


def _masked(draw: torch.Generator) -> Row:
    ids = _ids(draw)
    hidden = _number(draw, len(ids))
    return {"input_ids": ids, "labels": [t if n == hidden or n % 3 == 0 else IGNORED for n, t in enumerate(ids)]}


def _one_label(draw: torch.Generator) -> Row:
    return {"input_ids": _ids(draw), "labels": _number(draw, CLASSES)}


def _one_value(draw: torch.Generator) -> Row:
    return {"input_ids": _ids(draw), "labels": torch.randn((), generator=draw, dtype=torch.float64)}


def _many_labels(draw: torch.Generator) -> Row:
    return {"input_ids": _ids(draw), "labels": torch.rand(CLASSES, generator=draw).round().double()}


def _label_per_token(draw: torch.Generator) -> Row:
    ids = _ids(draw)
    return {"input_ids": ids, "labels": [_number(draw, CLASSES) if n % 4 else IGNORED for n in range(1, len(ids) + 1)]}


def _sequence_pair(draw: torch.Generator) -> Row:
    return {"input_ids": _ids(draw), "labels": _ids(draw, 8)}


def _image(draw: torch.Generator) -> Row:
    return {"pixel_values": torch.randn(1, 8, 8, generator=draw, dtype=torch.float64), "labels": _number(draw, CLASSES)}


def _choice(draw: torch.Generator) -> Row:
    first = _ids(draw)
    return {"input_ids": [first, first[::-1], [3] * len(first)], "labels": _number(draw, 3)}


def _span(draw: torch.Generator) -> Row:
    ids = _ids(draw)
    start = _number(draw, len(ids))
    return {"input_ids": ids, "start_positions": start, "end_positions": start + _number(draw, len(ids) - start)}


@dataclass(frozen=True)
class Head:
    """A tiny model without dropout, and a function that draws a row for it."""

    model_class: type[nn.Module]
    config: Any
    draw_row: Callable[[torch.Generator], Row]
    tolerance: float = 1e-10

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.model_class(copy.deepcopy(self.config)).double()  # a Trainer changes it

    def rows(self, n: int = N_ROWS, seed: int = 7) -> list[Row]:
        draw = torch.Generator().manual_seed(seed)
        return [self.draw_row(draw) for _ in range(n)]


# For heads that compute a part in float32 at any precision of the model: Llama token classification and the causal LMs
# their loss, T5 the softmax of its attention. `all_in_float64` prevents that.
_PART_IN_FLOAT32 = 1e-6

HEADS = {
    "causal LM, Llama": Head(LlamaForCausalLM, LlamaConfig(**_LLAMA), _next_token, _PART_IN_FLOAT32),
    "causal LM, Qwen2": Head(Qwen2ForCausalLM, Qwen2Config(**_LLAMA), _next_token, _PART_IN_FLOAT32),
    "causal LM, GPT-2": Head(GPT2LMHeadModel, GPT2Config(**_GPT2), _next_token, _PART_IN_FLOAT32),
    "masked LM, BERT": Head(BertForMaskedLM, BertConfig(**_BERT), _masked),
    "masked LM, DistilBERT": Head(DistilBertForMaskedLM, DistilBertConfig(**_DISTILBERT), _masked),
    "sequence classification, BERT": Head(
        BertForSequenceClassification, BertConfig(**_BERT, num_labels=CLASSES), _one_label
    ),
    "sequence classification, RoBERTa": Head(
        RobertaForSequenceClassification, RobertaConfig(**_BERT, num_labels=CLASSES), _one_label
    ),
    "sequence classification, DistilBERT": Head(
        DistilBertForSequenceClassification, DistilBertConfig(**_DISTILBERT, num_labels=CLASSES), _one_label
    ),
    "sequence classification, Llama": Head(
        LlamaForSequenceClassification, LlamaConfig(**_LLAMA, num_labels=CLASSES), _one_label
    ),
    "sequence classification, GPT-2": Head(
        GPT2ForSequenceClassification, GPT2Config(**_GPT2, num_labels=CLASSES), _one_label
    ),
    "regression, BERT": Head(BertForSequenceClassification, BertConfig(**_BERT, num_labels=1), _one_value),
    "multi-label, BERT": Head(
        BertForSequenceClassification,
        BertConfig(**_BERT, num_labels=CLASSES, problem_type="multi_label_classification"),
        _many_labels,
    ),
    "token classification, BERT": Head(
        BertForTokenClassification, BertConfig(**_BERT, num_labels=CLASSES), _label_per_token
    ),
    "token classification, RoBERTa": Head(
        RobertaForTokenClassification, RobertaConfig(**_BERT, num_labels=CLASSES), _label_per_token
    ),
    "token classification, Llama": Head(
        LlamaForTokenClassification,
        LlamaConfig(**_LLAMA, num_labels=CLASSES, classifier_dropout=0.0),
        _label_per_token,
        _PART_IN_FLOAT32,
    ),
    "seq2seq, T5": Head(T5ForConditionalGeneration, T5Config(**_T5), _sequence_pair, _PART_IN_FLOAT32),
    "seq2seq, BART": Head(BartForConditionalGeneration, BartConfig(**_BART), _sequence_pair),
    "image classification, ViT": Head(ViTForImageClassification, ViTConfig(**_VIT, num_labels=CLASSES), _image),
    "multiple choice, BERT": Head(BertForMultipleChoice, BertConfig(**_BERT), _choice),
    "question answering, BERT": Head(BertForQuestionAnswering, BertConfig(**_BERT), _span),
    "question answering, Llama": Head(LlamaForQuestionAnswering, LlamaConfig(**_LLAMA), _span),
}


@contextmanager
def all_in_float64() -> Iterator[None]:
    """Use float64 where heads convert to float32, so that only the error of the accumulation is left."""
    to_float32 = torch.Tensor.float
    narrow = (torch.float16, torch.bfloat16, torch.float32)
    torch.Tensor.float = lambda self: to_float32(self) if self.dtype in narrow else self.double()
    try:
        yield
    finally:
        torch.Tensor.float = to_float32


def one_batch(rows: Sequence[Row], left: bool = False) -> dict[str, Tensor]:
    """Return the rows as a batch, padded on the right or the left to the longest row in every dimension."""
    batch: dict[str, Tensor] = {}
    for key in rows[0]:
        values = [torch.as_tensor(row[key]) for row in rows]
        batch[key] = _padded(values, IGNORED if key == "labels" else PAD, left)
        if key == "input_ids":
            batch["attention_mask"] = _padded([torch.ones_like(value) for value in values], 0, left)
    return batch


def _padded(values: Sequence[Tensor], fill: int, left: bool) -> Tensor:
    size = [max(lengths) for lengths in zip(*(value.shape for value in values), strict=True)]
    padded = torch.full((len(values), *size), fill, dtype=values[0].dtype)
    for row, value in zip(padded, values, strict=True):
        lengths = zip(value.shape, size, strict=True)
        row[tuple(slice(m - n, m) if left else slice(n) for n, m in lengths)] = value
    return padded


def one_batch_gradient(model: nn.Module, rows: Sequence[Row], left: bool = False) -> dict[str, Tensor]:
    """Return the gradient of the model's own mean loss over a batch of all rows."""
    model.train()
    model.zero_grad()
    model(**one_batch(rows, left)).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def relative_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return ‖found − wanted‖ / ‖wanted‖ over all parameters. A missing gradient counts as 0."""
    zero = torch.zeros(())
    names = found.keys() | wanted.keys()
    off = sum(float(((found.get(n, zero) - wanted.get(n, zero)) ** 2).sum()) for n in names)
    return (off / sum(float((g**2).sum()) for g in wanted.values())) ** 0.5


class RecordingOptimizer(torch.optim.Optimizer):
    """An optimizer that records every update's gradient and does not change the weights."""

    takes_sharded_weights = True  # which a trial cannot show

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.gradients: list[dict[str, Tensor]] = []
        super().__init__([p for p in model.parameters() if p.requires_grad], {"lr": 1.0})

    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        held = {id(p) for p in self.param_groups[0]["params"]}  # sharding replaces parameters
        parameters = {name: p for name, p in self.model.named_parameters() if id(p) in held and p.grad is not None}
        self.gradients.append({name: unsharded(p.grad).clone() for name, p in parameters.items()})


def unsharded(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
