"""Tiny models, tokenizers and files of rows, as tasks load them, and the exactness of a task's own path."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoImageProcessor, BertConfig, BertModel, PreTrainedTokenizerFast

from exactness import windows_of
from ftaccum import load_task, test_fine_tuning
from heads import RecordingOptimizer, relative_error
from silent_errors.text_columns import TINY, word_tokenizer

TEXTS = ["a good film", "the plot drags", "good", "a slow second act in the film", "the film", "a plot", "slow"]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "ann", "lives", "in", "new", "york", "and", "bo", "##by", "##s", "who"]
PIECES += ["where", "?", "the", "big", "city", "was", "old", ",", "##land", "."]
needs_image_processor = pytest.mark.skipif(
    getattr(AutoImageProcessor, "is_dummy", False),
    reason="the image processors of this version need torchvision, which is not installed",
)


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of pieces of words, which begins rows with [CLS] and ends texts with [SEP], as BERT's does."""
    pieces = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [(name, PIECES.index(name)) for name in ("[CLS]", "[SEP]")]
    pieces.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        **names,
        model_max_length=32,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def save_encoder(folder: Path, tokenizer: Any = None, **config: Any) -> str:
    """Save a tiny BERT without a head, and a tokenizer, by default of words, and return their folder."""
    torch.manual_seed(0)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertModel(BertConfig(**{**TINY, **off, **config})).save_pretrained(folder)
    (tokenizer or word_tokenizer()).save_pretrained(folder)
    return str(folder)


def save_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows as JSON lines, and return the path."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def task_errors(
    task: str,
    model: str,
    file: str,
    rows: Sequence[Any],
    loss: Callable[[nn.Module, list[Any]], Tensor],
    **options: Any,
) -> list[float]:
    """Return the relative error of each window's gradient, in float64, against one batch that `loss` makes itself.

    Args:
        rows: the rows of the file, as `loss` takes them.
        loss: returns the loss of one batch of rows, in plain PyTorch.
    """
    loaded = load_task(task, model, file, validation_split=0.0, **options)
    sizes = {"batch_size": 2, "effective_batch_size": 5, "n_epochs": 1}
    loaded.model.double()
    wanted = []
    for window in windows_of(rows, **sizes):
        loaded.model.zero_grad()
        loss(loaded.model, window).backward()
        wanted.append({n: p.grad.clone() for n, p in loaded.model.named_parameters() if p.grad is not None})
    loaded.model.zero_grad()
    optimizer = RecordingOptimizer(loaded.model)
    fixed = {"optimizer": optimizer, "validation_split": 0.0, "gradient_clip_norm": None, "progress": False}
    test_fine_tuning(**loaded.arguments(), **sizes, **fixed)
    assert len(optimizer.gradients) == len(wanted) > 1
    return [relative_error(found, one) for found, one in zip(optimizer.gradients, wanted, strict=True)]
