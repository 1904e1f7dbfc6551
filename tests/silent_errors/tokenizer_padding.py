"""Tokenizers that do not pad as the model expects, so that a row's loss depends on the other rows of its batch."""

import torch
from torch import nn
from transformers import (
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from .case import case, update_error
from .text_columns import (
    LABELS,
    REVIEWS,
    TINY,
    WORDS,
    causal_lm,
    classifier,
    ids_of,
    loss_on_reviews,
    next_token_loss,
    word_tokenizer,
)

_TINY_GPT2 = {
    "vocab_size": len(WORDS), "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32, "pad_token_id": 0,
    "bos_token_id": 2, "eos_token_id": 2, "initializer_range": 0.3,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
CLASSIFIED = [{"text": text, "label": label} for text, label in zip(REVIEWS, LABELS, strict=True)]
TOKENS = [{"input_ids": ids_of(text)[0].tolist(), "labels": ids_of(text)[0].tolist()} for text in REVIEWS]


def left_padding() -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer()
    tokenizer.padding_side = "left"
    return tokenizer


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**_TINY_GPT2)).double()


def gpt2_classifier() -> nn.Module:
    torch.manual_seed(0)
    return GPT2ForSequenceClassification(GPT2Config(**_TINY_GPT2, num_labels=2)).double()


def llama_classifier(pad_token_id: int | None) -> nn.Module:
    torch.manual_seed(0)
    sizes = TINY | {"pad_token_id": pad_token_id}
    return LlamaForSequenceClassification(LlamaConfig(**sizes, num_key_value_heads=2, num_labels=2)).double()


def next_token_error(model: nn.Module, **arguments: object) -> float:
    rows = [("", text) for text in REVIEWS]
    return update_error(model, TOKENS, lambda model: next_token_loss(model, rows), len(rows), **arguments)


def class_error(model: nn.Module, **arguments: object) -> float:
    return update_error(model, CLASSIFIED, loss_on_reviews, len(REVIEWS), **arguments)


@case(19, "a causal LM (Llama) whose tokenizer pads on the left", tolerance=1e-6)  # its loss is computed in float32
def llama_on_the_left() -> float:
    return next_token_error(causal_lm(), tokenizer=left_padding())


@case(19, "a causal LM (GPT-2) whose tokenizer pads on the left", tolerance=1e-6)
def gpt2_on_the_left() -> float:
    return next_token_error(gpt2(), tokenizer=left_padding())


@case(19, "a causal LM whose collator pads on the left", refused="`tokenizer.padding_side` is 'left'")
def collator_on_the_left() -> float:
    tokenizer = left_padding()
    return next_token_error(causal_lm(), tokenizer=tokenizer, data_collator=DataCollatorForSeq2Seq(tokenizer))


@case(19, "a classifier (GPT-2) whose tokenizer pads on the left", refused="`tokenizer.padding_side` is 'left'")
def gpt2_classifier_on_the_left() -> float:
    return class_error(gpt2_classifier(), tokenizer=left_padding())


@case(19, "a classifier (BERT) whose tokenizer pads on the left", refused="`tokenizer.padding_side` is 'left'")
def bert_on_the_left() -> float:
    return class_error(classifier(), tokenizer=left_padding())


@case(20, "a classifier (Llama) whose tokenizer has another padding token", refused="`model.config.pad_token_id` is 2")
def another_padding_token() -> float:
    return class_error(llama_classifier(2), tokenizer=word_tokenizer())
