"""Print what trivial and plain methods reach on the rows of recipes, with the settings of their YAML files.

recipes/thresholds.yaml has these figures. `scripts/plain_baseline.py` trains the encoder of `text_classification` in
plain PyTorch.

    .venv/bin/python scripts/recipe_baselines.py                    # all that are here
    .venv/bin/python scripts/recipe_baselines.py multiple_choice
"""

import csv
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.svm import LinearSVC
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
import packaged
from ftaccum import load_task, test_fine_tuning
from packaged.files import letters_and_digits
from packaged.questions import AROUND
from seq2seq import distance

RECIPES = Path(packaged.__file__).parents[1]
_DISCOUNT = 0.75  # subtracted from each count (Ney, Essen and Kneser 1994)

Settings = dict[str, Any]
Figures = dict[str, float]


def main(names: Sequence[str]) -> None:
    found: dict[str, tuple[Callable[[Settings], Figures], str]] = {
        "search": (reviews_of_a_trial, ".1%"),
        "text_classification": (reviews, ".1%"),
        "token_classification": (tags, ".1%"),
        "question_answering": (answers, ".1%"),
        "multiple_choice": (choices, ".1%"),
        "masked_lm": (masked_tokens, ".1%"),
        "image_classification": (digits, ".1%"),
        "causal_lm": (ngram_losses, ".3f"),
        "seq2seq": (similar_word, ".1%"),
    }
    for name in names or found:
        method, form = found[name]
        settings = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
        print(f"{name}: {'; '.join(f'{each} {value:{form}}' for each, value in method(settings).items())}", flush=True)


def reviews(settings: Settings) -> Figures:
    """Return the accuracies of the most frequent label and of a linear model of words and pairs of words."""
    train, val = both_parts(packaged.MOVIES_TRAIN, packaged.MOVIES_VAL, settings)
    labels = [row["label"] for row in val]
    right = _linear(train).predict([row["text"] for row in val]) == labels
    return {
        "majority class": max(Counter(labels).values()) / len(labels),
        "TF-IDF with logistic regression": float(np.mean(right)),
    }


def _linear(train: Sequence[Any]) -> Pipeline:
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=10, max_iter=1000))
    return model.fit([row["text"] for row in train], [row["label"] for row in train])


def reviews_of_a_trial(settings: Settings) -> Figures:
    """Return the accuracy of a trial without accumulation, and that of a linear model on as many rows.

    The first is that of the rows that the recipe holds out. The second is that of the held-out reviews, which no trial
    sees.
    """
    share, n_rows = settings["validation_split"], settings["max_train_rows"]
    packaged.prepare(packaged.MINILM, packaged.MOVIES_TRAIN)
    model, rows = str(packaged.MINILM), str(packaged.MOVIES_TRAIN)
    loaded = load_task("text-classification", model, rows, max_train_rows=n_rows, validation_split=share)
    fixed = {name: settings[name] for name in ("batch_size", "n_epochs", "warmup_ratio")}
    trial = test_fine_tuning(
        **loaded.arguments(), **fixed, gradient_accumulation_steps=1, learning_rate=1e-4, validation_split=share
    )
    train, val = read(packaged.MOVIES_TRAIN, n_rows - round(share * n_rows)), read(packaged.MOVIES_VAL)
    return {
        "k = 1 and a learning rate of 1e-4": trial.metrics[-1]["accuracy"],
        f"TF-IDF with logistic regression on {len(train)} rows (of {len(val)} other rows)": float(
            _linear(train).score([row["text"] for row in val], [row["label"] for row in val])
        ),
    }


def tags(settings: Settings) -> Figures:
    """Return the shares of held-out words that get the right tag."""
    train, val = both_parts(packaged.ADDRESSES_TRAIN, packaged.ADDRESSES_VAL, settings)
    right = np.array([tag for row in val for tag in row["tags"]])
    of_word: dict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        for word, tag in zip(row["tokens"], row["tags"], strict=True):
            of_word[_bare(word)][tag] += 1
    usual = sum(of_word.values(), Counter[str]()).most_common(1)[0][0]
    by_word = [
        of_word[key].most_common(1)[0][0] if (key := _bare(word)) in of_word else usual
        for row in val
        for word in row["tokens"]
    ]
    vectors = DictVectorizer()
    features = vectors.fit_transform(_neighborhoods(train))
    features.indices, features.indptr = features.indices.astype("int32"), features.indptr.astype("int32")
    svm = LinearSVC(C=0.3, random_state=0).fit(features, [tag for row in train for tag in row["tags"]])
    return {
        "most frequent tag": float((right == usual).mean()),
        "most frequent tag of each word": float((right == by_word).mean()),
        "linear SVM on five words": float((right == svm.predict(vectors.transform(_neighborhoods(val)))).mean()),
    }


def _neighborhoods(rows: Sequence[Any]) -> list[dict[str, int]]:
    """Return features of each word and of two words on each side: spelling, kinds of characters, last character."""
    found = []
    for row in rows:
        words = [None, None, *row["tokens"], None, None]
        for n in range(len(row["tokens"])):
            features = {"from start": min(n, 5), "from end": min(len(row["tokens"]) - n, 5)}
            for place, word in enumerate(words[n : n + 5]):
                kinds = "".join("9" if c.isdigit() else "a" if c.isalpha() else c for c in word or "")[:6]
                features |= {f"{place} {each}": 1 for each in (_bare(word or ""), f"kinds {kinds}", (word or " ")[-1])}
            found.append(features)
    return found


def _bare(word: str) -> str:
    return word.lower().strip(AROUND)


def answers(settings: Settings) -> Figures:
    """Return the share of right answers if the words at the usual place of the answers to each question are taken.

    An answer is right if it has the letters and digits of the right one.
    """
    train, val = both_parts(packaged.QUESTIONS_TRAIN, packaged.QUESTIONS_VAL, settings)
    places: dict[str, Counter[tuple[int, int]]] = defaultdict(Counter)
    for row in train:
        n_words, start = len(row["context"].split()), row["context"][: row["answers"]["answer_start"][0]].count(" ")
        for first in (start, start - n_words):  # counted from the start, and from the end
            places[row["question"]][first, len(row["answers"]["text"][0].split())] += 1
    right = []
    for row in val:
        first, size = places[row["question"]].most_common(1)[0][0]
        words = row["context"].split()
        start = first if first >= 0 else max(len(words) + first, 0)
        found, wanted = "".join(words[start : start + size]), row["answers"]["text"][0]
        right.append(letters_and_digits(found) == letters_and_digits(wanted))
    return {"most usual place of the answers to a question": float(np.mean(right))}


def choices(settings: Settings) -> Figures:
    """Return the share of held-out rows in which a linear model of the training sentences chooses the right one."""
    train, val = both_parts(packaged.CHOICES_TRAIN, packaged.CHOICES_VAL, settings)
    sentences = [text for row in train for text in row["choices"]]
    praises = [n == row["label"] for row in train for n in range(len(row["choices"]))]
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), min_df=2), LogisticRegression(max_iter=1000))
    model.fit(sentences, praises)
    right = [int(np.argmax(model.decision_function(row["choices"]))) == row["label"] for row in val]
    return {"chance": 1 / len(val[0]["choices"]), "TF-IDF with logistic regression": float(np.mean(right))}


def masked_tokens(settings: Settings) -> Figures:
    """Return the share of held-out tokens that equal the most frequent token of the training texts."""
    packaged.prepare(packaged.MINILM)
    tokenizer = AutoTokenizer.from_pretrained(packaged.MINILM)
    train, val = (
        Counter(token for row in rows for token in tokenizer(row["text"], add_special_tokens=False)["input_ids"])
        for rows in both_parts(packaged.MOVIES_TRAIN, packaged.MOVIES_VAL, settings)
    )
    (usual, _), *_ = train.most_common(1)
    return {f"most frequent token ({tokenizer.decode([usual])!r})": val[usual] / val.total()}


def digits(_: Settings) -> Figures:
    """Return the accuracy on held-out digits, from pixels between 0 and 1."""
    packaged.prepare(packaged.DIGITS_TRAIN)
    (train, right), (val, wanted) = map(_images, (packaged.DIGITS_TRAIN, packaged.DIGITS_VAL))
    model = LogisticRegression(max_iter=2000).fit(train, right)
    return {
        "most frequent digit": float((wanted == Counter(right).most_common(1)[0][0]).mean()),
        "logistic regression on pixels": float((model.predict(val) == wanted).mean()),
    }


def _images(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    files = sorted(folder.rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(file)).ravel() / 255 for file in files])
    return pixels, np.array([file.parent.name for file in files])


def ngram_losses(settings: Settings) -> Figures:
    """Return the validation losses of a unigram, a bigram and a trigram model on the recipe's tokens.

    Like the recipe, they predict each token of a text but the first, and its end. Each model discounts the counts of
    its n-grams, and interpolates with the shorter one.
    """
    packaged.prepare(packaged.SMALL_LLAMA)
    tokenizer = AutoTokenizer.from_pretrained(packaged.SMALL_LLAMA)
    texts = both_parts(packaged.GLOSSES_TRAIN, packaged.GLOSSES_VAL, settings)
    train, val = ([[*ids, tokenizer.eos_token_id] for ids in tokenizer(part)["input_ids"]] for part in texts)
    counts, contexts, kinds = Counter[tuple[int, ...]](), Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()
    for gram in (gram for n in (1, 2, 3) for gram in _grams(train, n, shorter=False)):
        kinds[gram[:-1]] += gram not in counts
        counts[gram] += 1
        contexts[gram[:-1]] += 1

    def probability(gram: tuple[int, ...]) -> float:
        shorter = probability(gram[1:]) if len(gram) > 1 else 1 / len(tokenizer)
        seen = contexts[gram[:-1]]
        if not seen:
            return shorter
        return (max(counts[gram] - _DISCOUNT, 0) + _DISCOUNT * kinds[gram[:-1]] * shorter) / seen

    losses = ([-math.log(probability(gram)) for gram in _grams(val, n, shorter=True)] for n in (1, 2, 3))
    return dict(zip(("unigram model", "bigram model", "trigram model"), map(float, map(np.mean, losses)), strict=True))


def _grams(rows: Sequence[Sequence[int]], n: int, *, shorter: bool) -> Iterator[tuple[int, ...]]:
    """Yield the n tokens up to each token of a row but the first; at its start, fewer if `shorter`, else none."""
    for row in rows:
        for end in range(2, len(row) + 1):
            if shorter or end >= n:
                yield tuple(row[max(0, end - n) : end])


def similar_word(settings: Settings) -> Figures:
    """Return the error rate if each word is said as the training word that shares most of its letters.

    Words are compared by TF-IDF of groups of two to four letters.
    """
    train, val = both_parts(packaged.PRONUNCIATIONS_TRAIN, packaged.PRONUNCIATIONS_VAL, settings)
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    known = vectors.fit_transform([row["source"] for row in train])
    errors = 0
    for row, vector in zip(val, vectors.transform([row["source"] for row in val]), strict=True):
        nearest = train[int((known @ vector.T).toarray().argmax())]
        errors += distance(nearest["target"].split(), row["target"].split())
    return {"pronunciation of the most similar word": errors / sum(len(row["target"].split()) for row in val)}


def both_parts(train: Path, val: Path, settings: Settings) -> tuple[list[Any], list[Any]]:
    """Return the rows that a recipe trains on and those that it evaluates, as its settings limit them."""
    return read(train, settings.get("max_train_rows")), read(val, settings.get("max_val_rows"))


def read(path: Path, limit: int | None = None) -> list[Any]:
    """Prepare a packaged file if necessary, and return its first rows. Those of plain text are lines."""
    packaged.prepare(path)
    with path.open(newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            rows: list[Any] = list(csv.DictReader(file))
        else:
            lines = file.read().splitlines()
            rows = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else lines
    return rows[:limit]


if __name__ == "__main__":
    main(sys.argv[1:])
