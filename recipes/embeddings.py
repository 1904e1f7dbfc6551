"""Fine-tune a sentence encoder on pairs of texts, with all other pairs of an update as negatives.

    python recipes/embeddings.py --config recipes/embeddings.yaml      # packaged encoder, definitions and words
    python recipes/embeddings.py --train_data pairs.csv --val_data held_out.csv --anchor question --positive answer \\
        --batch_size 16 --effective_batch_size 1024
    accelerate launch --config_file recipes/two_cpu_processes.yaml recipes/embeddings.py

A contrastive loss compares each text with all pairs of its batch, so more pairs make a harder and more useful task.
With ordinary accumulation, a text would only be compared with the pairs of its micro-batch. This recipe computes the
loss over the whole update (`loss_over="window"`), in the memory of one micro-batch.

With embeddings.yaml, an update of 512 pairs takes about 16 seconds on one CPU core, and training takes 0.65 GB more.
After 20 updates without dropout, 25.7% of 2,000 held-out definitions find their word first. That is 22.3% if each is
compared with 16 words, and 18.5% before training (docs/window_losses.md).

The packaged task is a reverse dictionary: find the word for a definition. It takes any model that `AutoModel` loads and
whose outputs have one state per token. The embedding of a text is the mean of these states. The data are CSV, JSON or
Parquet files or Hub data sets with a column for each side of the pairs. The saved model in OUTPUT_DIR/model loads with
`AutoModel.from_pretrained(...)`.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer, EvalPrediction

import packaged
from ftaccum import DataError, SettingsError, test_fine_tuning
from ftaccum.apps.help import HelpPage
from ftaccum.apps.parser import parse
from ftaccum.arguments import find_faults, parse_settings, read_settings
from ftaccum.data.text_columns import check_column
from ftaccum.data.text_encoder import preserve_truncation
from ftaccum.data.tokenize import token_limit
from ftaccum.errors import refuse
from ftaccum.fields import LossOver, Positive, PositiveInt, Text, setting
from ftaccum.losses import MultipleNegativesRankingLoss
from ftaccum.runtime.library_output import library_bars
from ftaccum.settings.recipe import Recipe
from ftaccum.settings.runtime import Runtime
from ftaccum.tasks.arguments import ModelArguments
from ftaccum.tasks.model_source import ModelSource
from ftaccum.tasks.reading.rows import read_rows

_PAGE = HelpPage("python recipes/embeddings.py [options]", __doc__ or "")
_DEFAULTS = {f.name: f for f in fields(Recipe)}
_TOKENS = ("input_ids", "attention_mask")


@dataclass
class Sources(ModelArguments):
    """Model and data, with the packaged encoder, definitions and words as defaults."""

    model: Text = setting(str(packaged.MINILM), "folder or hub name of an encoder")
    train_data: Text = setting(
        str(packaged.WORDS_TRAIN), "CSV, JSON or Parquet file, folder or hub name[:config] of pairs of texts"
    )
    val_data: Text | None = setting(None, "held-out pairs, as for train_data")
    anchor: Text = setting("definition", "column of the texts that search")
    positive: Text = setting("word", "column of the texts to be found")
    scale: Positive = setting(20.0, "factor of the cosine similarities in the loss (1 / temperature)")
    max_train_rows: PositiveInt | None = setting(None, "train on at most N of the first rows; none: on all rows")
    max_val_rows: PositiveInt | None = setting(None, "use only the first N rows of `val_data`; none: all")

    def __post_init__(self) -> None:
        if self.train_data == str(packaged.WORDS_TRAIN) and self.val_data is None:
            self.val_data = str(packaged.WORDS_VAL)


@dataclass(frozen=True, kw_only=True)
class PairRecipe(Recipe):
    """A Recipe whose loss reads all rows of an update by default."""

    loss_over: LossOver = field(default="window", metadata=_DEFAULTS["loss_over"].metadata)


class PairEncoder(nn.Module):
    """An encoder of both sides of a pair, with shared weights.

    Suffixes of shapes: N rows, L tokens, D size of an embedding.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder, self.config = encoder, encoder.config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        positive_input_ids: Tensor,
        positive_attention_mask: Tensor,
    ) -> dict[str, Tensor]:
        """Return the embeddings of both sides, each of shape (rows, dim)."""
        return {
            "anchor": self.embed(input_ids, attention_mask),
            "positive": self.embed(positive_input_ids, positive_attention_mask),
        }

    def embed(self, ids_NL: Tensor, mask_NL: Tensor) -> Tensor:
        """Return the mean of the last hidden states over the tokens that are not padding."""
        states_NLD = self.encoder(input_ids=ids_NL, attention_mask=mask_NL).last_hidden_state
        weights_NL1 = mask_NL[..., None].to(states_NLD.dtype)
        embeddings_ND: Tensor = (states_NLD * weights_NL1).sum(1) / weights_NL1.sum(1)
        return embeddings_ND

    def save_pretrained(self, folder: Any) -> None:
        """Save the encoder alone, so that `AutoModel.from_pretrained` loads it."""
        self.encoder.save_pretrained(folder)


class PairCollator:
    """Pads the tokens of each side to its longest row."""

    def __init__(self, pad_token_id: int) -> None:
        self._pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = {
            name: pad_sequence(
                [torch.as_tensor(row[name]) for row in rows],
                batch_first=True,
                padding_value=self._pad_token_id if name.endswith("input_ids") else 0,
            )
            for name in rows[0]
            if name != "labels"
        }
        return batch | {"labels": torch.tensor([row["labels"] for row in rows])}


def read_pairs(source: str, columns: Sequence[str], limit: int | None, argument: str = "train_data") -> Dataset:
    """Return the first rows of a source, all if `limit` is None.

    Raises:
        DataError: if they cannot be read, or lack a column.
    """
    split = "train" if argument == "train_data" else "validation"
    rows = read_rows(source, argument=argument, split=split, text_columns=columns)
    assert isinstance(rows, Dataset)
    rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
    for column in columns:
        check_column(rows, argument, column)
        for n, text in enumerate(rows[column]):
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"In `{argument}`, row {n} has no text in the column {column!r}. Remove the row.")
    return rows


def encode(rows: Dataset, tokenizer: Any, columns: Sequence[str], max_length: int | None) -> Dataset:
    """Return rows of tokens. Rows with the same positive text have the same number as their label."""
    numbers: dict[str, int] = {}

    def encoded(batch: Mapping[str, list[str]]) -> dict[str, Any]:
        sides = {
            prefix: tokenizer(batch[column], truncation=max_length is not None, max_length=max_length)
            for prefix, column in zip(("", "positive_"), columns, strict=True)
        }
        labels = [numbers.setdefault(text, len(numbers)) for text in batch[columns[1]]]
        tokens = {f"{prefix}{name}": side[name] for prefix, side in sides.items() for name in _TOKENS}
        return tokens | {"labels": labels}

    with library_bars(shown=False), preserve_truncation(tokenizer):
        return rows.map(encoded, batched=True, remove_columns=rows.column_names, load_from_cache_file=False)


def retrieval(found: EvalPrediction) -> dict[str, float]:
    """Return how well the anchors find their positives, by cosine similarity to the positives of all rows.

    The rank of a row is 1 for a positive that is nearest to its anchor. Positives with the same label count as one.
    Those that are as near as a row's own rank before it.

    Args:
        found: `predictions` are the embeddings of anchors and positives, each of shape (rows, dim); `label_ids` are the
            labels.

    Returns:
        `recall@1` and `recall@10`, the shares of rows that rank first and among the first ten; and `mrr`, the mean of
        1 / rank.
    """
    anchors_ND, positives_ND = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in found.predictions)
    labels_N = np.asarray(found.label_ids)
    scores_NN = anchors_ND @ positives_ND.T
    own_N1 = np.diagonal(scores_NN)[:, None]
    ranks_N = 1 + ((scores_NN >= own_N1) & (labels_N[:, None] != labels_N)).sum(1)
    return {
        "recall@1": float((ranks_N <= 1).mean()),
        "recall@10": float((ranks_N <= 10).mean()),
        "mrr": float((1 / ranks_N).mean()),
    }


def main(arguments: list[str]) -> None:
    sources, recipe, runtime = parse([Sources, PairRecipe, Runtime], arguments, page=_PAGE)
    settings = vars(recipe) | vars(runtime)
    sources = read_settings(Sources, vars(sources))
    refuse(find_faults(sources))
    parse_settings(settings)  # before anything is loaded
    state = PartialState(cpu=not torch.accelerator.is_available())
    with state.main_process_first():  # the other processes reuse its files
        packaged.prepare(sources.model, sources.train_data, sources.val_data)
        columns, pairs = (sources.anchor, sources.positive), {}
        pairs["train_data"] = read_pairs(sources.train_data, columns, sources.max_train_rows)
        if sources.val_data is not None:
            pairs["val_data"] = read_pairs(sources.val_data, columns, sources.max_val_rows, "val_data")
        with library_bars(shown=False):
            encoder, tokenizer = ModelSource(sources, AutoModel, AutoTokenizer).load()
        limit = token_limit(tokenizer, encoder.config, encoder, recipe.max_length)
        rows = {argument: encode(each, tokenizer, columns, limit) for argument, each in pairs.items()}

    result = test_fine_tuning(
        PairEncoder(encoder),
        **rows,
        tokenizer=tokenizer,  # saved with the model
        data_collator=PairCollator(tokenizer.pad_token_id),
        loss_fn=MultipleNegativesRankingLoss(scale=sources.scale, group="labels"),
        compute_metrics=retrieval,
        **settings,
    )

    if state.is_main_process:
        if result.metrics and result.metrics[-1]:
            # The saved model is that of the best or the last evaluation.
            restored = result.restored_update
            saved = -1 if restored is None else result.evaluation_updates.index(restored)
            found = ", ".join(f"{name} {value:.3f}" for name, value in result.metrics[saved].items())
            print(f"Held-out retrieval: {found}")
        if runtime.output_dir:
            print(f"Model, ledger and result: {Path(runtime.output_dir).resolve()}")
    state.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (SettingsError, DataError) as error:
        print(f"embeddings: {error}", file=sys.stderr)
        sys.exit(2)
