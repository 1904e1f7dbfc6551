"""Fine-tune a sentence encoder on pairs of texts, with all other pairs of an update as negatives.

    python recipes/embeddings.py --config recipes/embeddings.yaml      # packaged encoder, definitions and words
    python recipes/embeddings.py --model sentence-transformers/all-MiniLM-L6-v2 --anchor query --positive answer \\
        --train_data sentence-transformers/natural-questions --batch_size 16 --effective_batch_size 1024
    python recipes/embeddings.py --train_data pairs.csv --val_data held_out.csv --anchor question --positive answer
    accelerate launch --config_file recipes/two_cpu_processes.yaml recipes/embeddings.py \\
        --config recipes/embeddings.yaml

A contrastive loss compares each text with all pairs of its batch, so more pairs make a harder and more useful task.
With ordinary accumulation, a text would only be compared with the pairs of its micro-batch. This recipe computes the
loss over the whole update (`loss_over="window"`), in the memory of one micro-batch.

It takes any model that `AutoModel` loads and whose outputs have one state per token, and files or Hub data sets with a
column for each side of the pairs. The embedding of a text is the mean of its tokens' states. The packaged task is a
reverse dictionary: find the word for a definition. The saved model in OUTPUT_DIR/model loads with
`AutoModel.from_pretrained(...)`.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import AutoModel

import ftaccum
import packaged
from ftaccum.losses import MultipleNegativesRankingLoss

if TYPE_CHECKING:
    from transformers import EvalPrediction


@dataclass
class Options(ftaccum.ModelAndDataOptions):
    """The columns of the pairs, and the loss."""

    anchor: str = field(default="definition", metadata={"help": "column of the texts that search"})
    positive: str = field(default="word", metadata={"help": "column of the texts to be found"})
    scale: float = field(default=20.0, metadata={"help": "factor of the cosine similarities in the loss"})


class PairEncoder(ftaccum.ModelWrapper):
    """An encoder of both sides of a pair, with shared weights.

    Suffixes of shapes: N rows, L tokens, D size of an embedding.
    """

    def forward(
        self,
        anchor_input_ids: Tensor,
        anchor_attention_mask: Tensor,
        positive_input_ids: Tensor,
        positive_attention_mask: Tensor,
    ) -> dict[str, Tensor]:
        """Return the embeddings of both sides, each of shape (rows, dim)."""
        return {
            "anchor": self.embed(anchor_input_ids, anchor_attention_mask),
            "positive": self.embed(positive_input_ids, positive_attention_mask),
        }

    def embed(self, ids_NL: Tensor, mask_NL: Tensor) -> Tensor:
        """Return the mean of the last hidden states over the tokens that are not padding."""
        states_NLD = self.model(input_ids=ids_NL, attention_mask=mask_NL).last_hidden_state
        weights_NL1 = mask_NL[..., None].to(states_NLD.dtype)
        embeddings_ND: Tensor = (states_NLD * weights_NL1).sum(1) / weights_NL1.sum(1)
        return embeddings_ND


def encode(rows: Dataset, tokenizer: Any, anchor: str, positive: str, **options: Any) -> Dataset:
    """Return rows of tokens. Rows with the same positive text have the same number as their label."""
    numbers = {text: n for n, text in enumerate(dict.fromkeys(rows[positive]))}
    pairs = Dataset.from_dict({"anchor": rows[anchor], "positive": rows[positive]})
    labelled = pairs.add_column("labels", [numbers[text] for text in rows[positive]])
    return ftaccum.tokenize_columns(labelled, tokenizer, {"anchor": "anchor", "positive": "positive"}, **options)


def retrieval(found: "EvalPrediction") -> dict[str, float]:
    """Return how well the anchors find their positives, by cosine similarity to the positives of all rows.

    The rank of a row is 1 for a positive that is nearest to its anchor. Positives with the same label count as one.
    Those that are as near as a row's own rank before it, and so do those whose similarity is not a number.

    Args:
        found: `predictions` are the embeddings of anchors and positives, each of shape (rows, dim); `label_ids` are the
            labels.

    Returns:
        `recall@1` and `recall@10`, the shares of rows that rank first and among the first ten; and `mrr`, the mean of
        1 / rank.
    """
    with np.errstate(invalid="ignore"):  # a vector of zeros has no direction
        anchors_ND, positives_ND = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in found.predictions)
    labels_N = np.asarray(found.label_ids)
    scores_NN = anchors_ND @ positives_ND.T
    own_N1 = np.diagonal(scores_NN)[:, None]
    ranks_N = 1 + (~(scores_NN < own_N1) & (labels_N[:, None] != labels_N)).sum(1)
    return {
        "recall@1": float((ranks_N <= 1).mean()),
        "recall@10": float((ranks_N <= 10).mean()),
        "mrr": float((1 / ranks_N).mean()),
    }


def main(options: ftaccum.ScriptOptions) -> ftaccum.Result:
    extra: Options = options.extra
    loss = MultipleNegativesRankingLoss(scale=extra.scale, group="labels")
    packaged.prepare(extra.model, extra.train_data, extra.val_data)
    rows = extra.read((extra.anchor, extra.positive))
    encoder, tokenizer = extra.load(AutoModel)
    length = options.settings["max_length"]
    encoded = {
        argument: encode(each, tokenizer, extra.anchor, extra.positive, model=encoder, max_length=length)
        for argument, each in rows.items()
    }
    result = ftaccum.test_fine_tuning(
        PairEncoder(encoder),
        **encoded,
        tokenizer=tokenizer,
        loss_fn=loss,
        compute_metrics=retrieval,
        lora=extra.lora_argument(),
        **options.settings,
    )
    for when, metrics in (("before", result.initial_metrics), ("after", result.metrics[-1] if result.metrics else {})):
        if metrics:
            found = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            PartialState().print(f"Held-out retrieval {when} training: {found}")
    return result


if __name__ == "__main__":
    ftaccum.run_script(
        main,
        __doc__,
        extra=Options,
        loss_over="window",
        model=packaged.MINILM,
        train_data=packaged.WORDS_TRAIN,
        val_data=packaged.WORDS_VAL,
    )
