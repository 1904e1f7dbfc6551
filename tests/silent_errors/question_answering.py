"""Heads that choose a span of a row."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForQuestionAnswering

from .case import case, update_error

_BERT = BertConfig(
    vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


def _answers(n_rows: int, *, beyond: bool) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(5)
    rows = []
    for n in range(n_rows):
        length = 6 + 2 * (n % 5)
        start, end = sorted(torch.randint(length, (2,), generator=draw).tolist())
        if beyond and n in (21, 41, 102):
            end = 40
        if beyond and n == 151:
            start = end = 512
        ids = torch.randint(1, 61, (length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "start_positions": start, "end_positions": end})
    return rows


def _padded(rows: list[dict[str, Any]], width: int) -> dict[str, Tensor]:
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for n, row in enumerate(rows):
        ids[n, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
    positions = {name: torch.tensor([row[name] for row in rows]) for name in ("start_positions", "end_positions")}
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), **positions}


def _question_answering() -> nn.Module:
    torch.manual_seed(0)
    return BertForQuestionAnswering(_BERT).double()


@case(5, "answers beyond the width of the rows")
def answers_beyond_the_width() -> float:
    rows = _answers(200, beyond=True)
    whole = _padded(rows, 14)
    return update_error(_question_answering(), rows, lambda model: model(**whole).loss, len(rows), batch_size=4)


@case(13, "question answering with a collator that draws at random")
def question_answering_that_draws() -> float:
    rows = _answers(24, beyond=False)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        torch.rand(())  # like a collator that masks tokens
        return _padded(rows, max(len(row["input_ids"]) for row in rows))

    whole = _padded(rows, 14)
    return update_error(
        _question_answering(), rows, lambda model: model(**whole).loss, len(rows), data_collator=collate
    )
