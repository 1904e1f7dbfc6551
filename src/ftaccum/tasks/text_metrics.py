"""Metrics of generated texts: exact match, and ROUGE, chrF and BLEU where their packages are installed."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from transformers import EvalPrediction

_ROUGE = ("rouge1", "rouge2", "rougeL")
_OF_PACKAGES: Mapping[str, tuple[str, ...]] = {"rouge_score": _ROUGE, "sacrebleu": ("chrf", "bleu")}
EXACT_MATCH = "exact_match"


def installed_metrics() -> tuple[str, ...]:
    """Return the names of the metrics whose packages are installed."""
    return (EXACT_MATCH, *(name for package, names in _OF_PACKAGES.items() if find_spec(package) for name in names))


def missing_metrics() -> dict[str, str]:
    """Return the names of the other metrics, each with the command that installs its package."""
    missing = [package for package in _OF_PACKAGES if find_spec(package) is None]
    return {name: f"pip install {package.replace('_', '-')}" for package in missing for name in _OF_PACKAGES[package]}


def decoded(ids: Any, tokenizer: Any) -> list[str]:
    """Return token ids, padded with -100, as texts without special tokens and without spaces around them."""
    ids = np.asarray(ids)
    pad = tokenizer.pad_token_id
    filled = np.where(ids < 0, 0 if pad is None else pad, ids)
    if pad is None:
        return [tokenizer.decode(row[row >= 0], skip_special_tokens=True).strip() for row in ids]
    return [text.strip() for text in tokenizer.batch_decode(filled, skip_special_tokens=True)]


class TextMetrics:
    """Compares generated texts with those of the labels. Use it as `compute_metrics`, with `generation_kwargs`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, evaluated: EvalPrediction) -> dict[str, float]:
        """Return the metrics of the predictions, which are token ids, against the labels."""
        found, wanted = (decoded(ids, self._tokenizer) for ids in (evaluated.predictions, evaluated.label_ids))
        return text_metrics(found, wanted)


def text_metrics(found: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Return the metrics of texts against one reference each, as far as their packages are installed.

    Exact match is the share of equal texts. ROUGE (Lin 2004) is the mean F1 of single words, of pairs of words and of
    the longest common subsequence, from 0 to 1, by rouge-score without stemming, which reads only letters from a to z
    and digits. chrF (Popović 2015) and BLEU (Papineni et al. 2002) are those of sacrebleu for all texts together, from
    0 to 100.
    """
    metrics = {EXACT_MATCH: float(np.mean([one == other for one, other in zip(found, wanted, strict=True)]))}
    if find_spec("rouge_score"):
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer

        # Without a tokenizer, it logs through absl, which adds a handler to the root logger.
        scorer = RougeScorer(list(_ROUGE), tokenizer=DefaultTokenizer(use_stemmer=False))
        scores = [scorer.score(other, one) for one, other in zip(found, wanted, strict=True)]
        metrics |= {name: float(np.mean([score[name].fmeasure for score in scores])) for name in _ROUGE}
    if find_spec("sacrebleu"):
        from sacrebleu.metrics import BLEU, CHRF

        references = [list(wanted)]
        metrics["chrf"] = CHRF().corpus_score(list(found), references).score
        metrics["bleu"] = BLEU(force=True).corpus_score(list(found), references).score
    return metrics
