"""Raw text: columns that were chosen silently, and documents of a causal LM without an end token."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ftaccum import test_fine_tuning

from .case import case, update_error

WORDS = ["[PAD]", "[UNK]", "</s>", "a", "the", "good", "bad", "film", "very", "not", "positive", "negative"]
WORDS += [f"row{n}" for n in range(12)]
TINY = {
    "vocab_size": len(WORDS), "pad_token_id": 0, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3,
}  # fmt: skip
REVIEWS = ["a good film", "the bad film", "not a very good film", "very good", "bad", "a film", "the good film"]
LABELS = [n % 2 for n in range(len(REVIEWS))]
FEELINGS = [("negative", "positive")[label] for label in LABELS]


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>", model_max_length=32
    )


def classifier() -> nn.Module:
    torch.manual_seed(0)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**TINY, **off, num_labels=2)).double()


def causal_lm() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=2)).double()


def ids_of(text: str) -> Tensor:
    return torch.tensor([[WORDS.index(word) for word in text.split()]])


def loss_on_reviews(model: nn.Module) -> Tensor:
    """Return the classifier's loss on the reviews, one at a time and so without padding."""
    losses = [
        F.cross_entropy(model(input_ids=ids_of(text)).logits, torch.tensor([label]))
        for text, label in zip(REVIEWS, LABELS, strict=True)
    ]
    return torch.stack(losses).mean()


def next_token_loss(model: nn.Module, rows: Sequence[tuple[str, str]]) -> Tensor:
    """Return the mean loss over the tokens of the answers in (prompt, answer), one row at a time."""
    losses = []
    for prompt, answer in rows:
        ids, n_prompt = ids_of(f"{prompt} {answer}"), len(prompt.split())
        first = max(n_prompt, 1)
        losses.append(F.cross_entropy(model(input_ids=ids).logits[0, first - 1 : -1], ids[0, first:], reduction="none"))
    return torch.cat(losses).mean()


def classifier_error(rows: Sequence[Mapping[str, Any]], **arguments: Any) -> float:
    return update_error(classifier(), rows, loss_on_reviews, len(rows), tokenizer=word_tokenizer(), **arguments)


def causal_error(rows: Sequence[Mapping[str, Any]], wanted: Sequence[tuple[str, str]], **arguments: Any) -> float:
    return update_error(
        causal_lm(),
        rows,
        lambda model: next_token_loss(model, wanted),
        len(rows),
        tokenizer=word_tokenizer(),
        **arguments,
    )


@case(16, "an id beside the text is trained on", refused="2 columns of text: 'id' .* 'review'")
def id_and_review() -> float:
    columns = zip(REVIEWS, LABELS, strict=True)
    return classifier_error([{"id": f"row{n}", "review": t, "label": y} for n, (t, y) in enumerate(columns)])


@case(16, "the label's name in a column of its own is trained on", refused="'review' .* 'label_text'")
def label_in_words() -> float:
    columns = zip(REVIEWS, LABELS, FEELINGS, strict=True)
    return classifier_error([{"review": t, "label": y, "label_text": name} for t, y, name in columns])


@case(16, "a column `text` is taken before `review`", refused="2 columns of text: 'text' .* 'review'")
def text_is_not_the_text() -> float:
    columns = zip(REVIEWS, LABELS, strict=True)
    return classifier_error([{"text": f"row{n}", "review": t, "label": y} for n, (t, y) in enumerate(columns)])


@case(16, "prompts of a causal LM are trained on", refused="labels of -100 on the prompt")
def prompt_and_response() -> float:
    rows = [{"prompt": f"the film row{n}", "response": text} for n, text in enumerate(REVIEWS)]
    return causal_error(rows, [(row["prompt"], f"{row['response']} </s>") for row in rows])


@case(16, "the first row of a causal LM lacks the response", refused="labels of -100 on the prompt")
def response_from_the_second_row_on() -> float:
    rows = [{"prompt": "the film row0"}]
    rows += [{"prompt": f"the film row{n}", "response": text} for n, text in enumerate(REVIEWS)]
    return causal_error(rows, [(row["prompt"], f"{row.get('response', '')} </s>") for row in rows])


@case(16, "an id beside lists of words is trained on", refused="is_split_into_words")
def id_and_words() -> float:
    columns = zip(REVIEWS, LABELS, strict=True)
    return classifier_error([{"id": f"row{n}", "words": t.split(), "label": y} for n, (t, y) in enumerate(columns)])


@case(16, "an id beside conversations is trained on", refused="apply_chat_template")
def id_and_messages() -> float:
    rows = [
        {"id": f"a row{n}", "messages": [{"role": "user", "content": "a film"}, {"role": "assistant", "content": text}]}
        for n, text in enumerate(REVIEWS)
    ]
    return causal_error(rows, [("a film", f"{text} </s>") for text in REVIEWS])


@case(16, "documents of a causal LM never end", tolerance=1e-6)  # its loss is computed in float32
def end_of_text() -> float:
    return causal_error([{"text": text} for text in REVIEWS], [("", f"{text} </s>") for text in REVIEWS])


@case(16, "validation rows have one more column of text")
def validation_with_a_title() -> float:
    columns = list(zip(REVIEWS, LABELS, strict=True))
    found = test_fine_tuning(
        classifier(),
        train_data=[{"review": t, "label": y} for t, y in columns],
        val_data=[{"title": f"row{n}", "review": t, "label": y} for n, (t, y) in enumerate(columns)],
        tokenizer=word_tokenizer(),
        n_epochs=1,
        progress=False,
    ).initial_loss
    return abs(found / loss_on_reviews(classifier()).item() - 1)


@case(16, "validation rows lack the column trained on", refused="`val_data` .* no column 'review'")
def validation_without_the_column() -> float:
    columns = list(zip(REVIEWS, LABELS, strict=True))
    found = test_fine_tuning(
        classifier(),
        train_data=[{"review": t, "label": y} for t, y in columns],
        val_data=[{"title": f"row{n}", "label": y} for n, (_, y) in enumerate(columns)],
        tokenizer=word_tokenizer(),
        n_epochs=1,
        progress=False,
    ).initial_loss
    return abs(found / loss_on_reviews(classifier()).item() - 1)
