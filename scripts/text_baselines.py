"""Print what plain methods reach on the rows of the recipes causal_lm and seq2seq, with the settings of their YAML.

.venv/bin/python scripts/text_baselines.py
"""

import csv
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from sklearn.feature_extraction.text import TfidfVectorizer
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
import packaged
from seq2seq import distance

_RECIPES = Path(packaged.__file__).parents[1]
_DISCOUNT = 0.75  # subtracted from each count (Ney, Essen and Kneser 1994)


def main() -> None:
    packaged.prepare(packaged.SMALL_LLAMA, packaged.GLOSSES_TRAIN, packaged.PRONUNCIATIONS_TRAIN)
    losses = ngram_losses(_settings("causal_lm"))
    print("causal_lm:", "; ".join(f"{words}-gram {loss:.3f}" for words, loss in enumerate(losses, 1)))
    print(f"seq2seq: pronunciation of the most similar word {similar_word(_settings('seq2seq')):.1%}")


def _settings(recipe: str) -> dict[str, Any]:
    return yaml.safe_load((_RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))


def ngram_losses(settings: dict[str, Any]) -> list[float]:
    """Return the validation losses of a unigram, a bigram and a trigram model on the recipe's tokens.

    Like the recipe, they predict each token of a text but the first, and its end. Each model discounts the counts of
    its n-grams, and interpolates with the shorter one.
    """
    tokenizer = AutoTokenizer.from_pretrained(packaged.SMALL_LLAMA)

    def rows(path: Path, limit: int) -> list[list[int]]:
        texts = path.read_text(encoding="utf-8").splitlines()[:limit]
        return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]

    train = rows(packaged.GLOSSES_TRAIN, settings["max_train_rows"])
    val = rows(packaged.GLOSSES_VAL, settings["max_val_rows"])
    counts: Counter[tuple[int, ...]] = Counter()
    contexts: Counter[tuple[int, ...]] = Counter()
    kinds: Counter[tuple[int, ...]] = Counter()
    for row in train:
        for end in range(2, len(row) + 1):
            for n in range(1, min(3, end) + 1):
                gram = tuple(row[end - n : end])
                kinds[gram[:-1]] += gram not in counts
                counts[gram] += 1
                contexts[gram[:-1]] += 1

    def probability(gram: tuple[int, ...]) -> float:
        shorter = probability(gram[1:]) if len(gram) > 1 else 1 / len(tokenizer)
        seen = contexts[gram[:-1]]
        if not seen:
            return shorter
        return (max(counts[gram] - _DISCOUNT, 0) + _DISCOUNT * kinds[gram[:-1]] * shorter) / seen

    n_tokens = sum(len(row) - 1 for row in val)
    return [
        -sum(math.log(probability(tuple(row[max(0, end - n) : end]))) for row in val for end in range(2, len(row) + 1))
        / n_tokens
        for n in (1, 2, 3)
    ]


def similar_word(settings: dict[str, Any]) -> float:
    """Return the error rate if each word is said as the training word that shares most of its letters.

    Words are compared by TF-IDF of groups of two to four letters.
    """

    def rows(path: Path) -> Sequence[dict[str, str]]:
        with path.open(encoding="utf-8") as file:
            return list(csv.DictReader(file))

    train, val = rows(packaged.PRONUNCIATIONS_TRAIN)[: settings["max_train_rows"]], rows(packaged.PRONUNCIATIONS_VAL)
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    known = vectors.fit_transform([row["source"] for row in train])
    errors = 0
    for row, vector in zip(val, vectors.transform([row["source"] for row in val]), strict=True):
        nearest = train[int((known @ vector.T).toarray().argmax())]
        errors += distance(nearest["target"].split(), row["target"].split())
    return errors / sum(len(row["target"].split()) for row in val)


if __name__ == "__main__":
    main()
