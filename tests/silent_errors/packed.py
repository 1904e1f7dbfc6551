"""Packed rows: several documents in one row, marked by positions that restart."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertForTokenClassification,
    BloomConfig,
    BloomForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from heads import CLASSES, HEADS, IGNORED, VOCABULARY, Row, all_in_float64

from .case import case, update_error

LLAMA, TAGGER = HEADS["causal LM, Llama"], HEADS["token classification, Llama"]
N_ROWS = 7
NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}


def documents(n_rows: int = N_ROWS) -> list[list[list[int]]]:
    """Return rows of one to four documents, of two to six tokens each."""
    draw = torch.Generator().manual_seed(3)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    return [[[number(3, VOCABULARY - 1) for _ in range(number(2, 6))] for _ in range(n % 4 + 1)] for n in range(n_rows)]


def packed(row: Sequence[Sequence[int]], labels: Callable[[Sequence[int]], list[int]]) -> Row:
    return {
        "input_ids": [token for document in row for token in document],
        "labels": [label for document in row for label in labels(document)],
        "position_ids": [n for document in row for n in range(len(document))],
    }


def tags(document: Sequence[int]) -> list[int]:
    return [token % CLASSES for token in document]


def next_tokens_alone(model: nn.Module) -> Tensor:
    """Return the mean loss over all predicted tokens, with one forward pass for each document."""
    total, n = torch.zeros((), dtype=torch.float64), 0
    for document in (document for row in documents() for document in row):
        ids = torch.tensor([document])
        total = total + F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        n += len(document) - 1
    return total / n


def tags_alone(model: nn.Module) -> Tensor:
    """Return the mean loss over all tokens, with one forward pass for each document."""
    total, n = torch.zeros((), dtype=torch.float64), 0
    for document in (document for row in documents() for document in row):
        logits = model(input_ids=torch.tensor([document])).logits[0]
        total = total + F.cross_entropy(logits, torch.tensor(tags(document)), reduction="sum")
        n += len(document)
    return total / n


def causal_lm(attention: str = "sdpa") -> Any:
    model = LLAMA.model()
    model.set_attn_implementation(attention)
    return model


def error_in_float64(*arguments: Any, **more: Any) -> float:
    with all_in_float64():
        return update_error(*arguments, **more)


@case(2, "packed rows without a mask, labels as the tokens")
def labels_as_the_tokens() -> float:
    return error_in_float64(causal_lm(), [packed(row, list) for row in documents()], next_tokens_alone, N_ROWS)


@case(2, "packed rows, each document's first label ignored")
def first_labels_ignored() -> float:
    rows = [packed(row, lambda document: [IGNORED, *document[1:]]) for row in documents()]
    return error_in_float64(causal_lm(), rows, next_tokens_alone, N_ROWS)


@case(2, "packed rows, one a micro-batch, with eager attention", tolerance=1e-6)
def one_row_at_a_time() -> float:
    rows = [packed(row, list) for row in documents()]
    return error_in_float64(causal_lm("eager"), rows, next_tokens_alone, N_ROWS, batch_size=1)


@case(2, "packed rows padded on the left")
def padded_on_the_left() -> float:
    class Left:
        padding_side = "left"

    rows = [packed(row, list) for row in documents()]
    return error_in_float64(causal_lm(), rows, next_tokens_alone, N_ROWS, batch_size=3, tokenizer=Left())


@case(2, "packed rows whose tokens are classified")
def tagged_tokens() -> float:
    rows = [packed(row, tags) for row in documents()]
    return error_in_float64(TAGGER.model(), rows, tags_alone, N_ROWS)


@case(2, "packed rows, their next tokens compared by a function of the user's own")
def own_function() -> float:
    def loss_fn(outputs: Any, batch: Any) -> Tensor:
        return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    rows = [packed(row, list) for row in documents()]
    return error_in_float64(causal_lm(), rows, next_tokens_alone, N_ROWS, loss_fn=loss_fn)


@case(2, "packed rows with a mask of ones", refused="Leave out the column `attention_mask`")
def mask_of_ones() -> float:
    rows = [packed(row, list) for row in documents()]
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return error_in_float64(causal_lm(), rows, next_tokens_alone, N_ROWS)


@case(2, "packed rows for a model that looks both ways", refused="BertForTokenClassification lets the documents of a")
def both_ways() -> float:
    model = BertForTokenClassification(HEADS["token classification, BERT"].config).double()
    return error_in_float64(model, [packed(row, tags) for row in documents()], tags_alone, N_ROWS)


@case(2, "packed rows for a model that forgets positions", refused="lets the documents of a row attend to each other")
def forgotten_positions() -> float:
    class Forgetful(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, position_ids: Any = None, labels: Any = None, **rest: Any) -> Any:
            del position_ids
            return super().forward(input_ids, labels=labels, **rest)

    return error_in_float64(
        Forgetful(LLAMA.config).double(), [packed(row, list) for row in documents()], next_tokens_alone, N_ROWS
    )


@case(2, "packed rows for a model without positions", refused="MambaForCausalLM lets the documents of a row attend")
def without_positions() -> float:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)
    rows = [packed(row, list) for row in documents()]
    return error_in_float64(MambaForCausalLM(config).double(), rows, next_tokens_alone, N_ROWS)


@case(2, "packed rows with a mask, for a model without positions", refused="lets the documents of a row attend")
def masked_without_positions() -> float:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2, **NO_DROPOUT)
    rows = [packed(row, list) for row in documents()]
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return error_in_float64(BloomForCausalLM(config).double(), rows, next_tokens_alone, N_ROWS)


@case(2, "packed rows with one label each", refused="it does not have one label per token")
def one_label_a_row() -> float:
    def loss_of_all(model: nn.Module) -> Tensor:  # of the last document of each row
        logits = [model(input_ids=torch.tensor([row[-1]])).logits[0] for row in documents()]
        return F.cross_entropy(torch.stack(logits), torch.arange(N_ROWS) % CLASSES)

    rows = [{**packed(row, list), "labels": n % CLASSES} for n, row in enumerate(documents())]
    return error_in_float64(HEADS["sequence classification, Llama"].model(), rows, loss_of_all, N_ROWS)
