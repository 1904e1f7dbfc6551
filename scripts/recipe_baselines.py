"""Print what trivial and plain methods reach on the packaged data of recipes.

.venv/bin/python scripts/recipe_baselines.py                         # all that are here
.venv/bin/python scripts/recipe_baselines.py multiple_choice
"""

import csv
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
import packaged
from ftaccum.tasks.answer_scores import exact_match
from packaged.choices import read

_AROUND = " ,.;()"


def main() -> None:
    found = {
        "token_classification": tags,
        "question_answering": answers,
        "multiple_choice": choices,
        "masked_lm": masked_tokens,
        "image_classification": digits,
    }
    for name in sys.argv[1:] or found:
        print(f"{name}: {'; '.join(f'{method} {share:.1%}' for method, share in found[name]().items())}", flush=True)


def tags() -> dict[str, float]:
    """Return the shares of held-out words that get the right tag."""
    train, val = _rows(packaged.ADDRESSES_TRAIN), _rows(packaged.ADDRESSES_VAL)
    right = np.array([tag for row in val for tag in row["tags"]])
    of_word: dict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        for word, tag in zip(row["tokens"], row["tags"], strict=True):
            of_word[_plain(word)][tag] += 1
    usual = sum(of_word.values(), Counter[str]()).most_common(1)[0][0]
    by_word = [
        of_word[key].most_common(1)[0][0] if (key := _plain(word)) in of_word else usual
        for row in val
        for word in row["tokens"]
    ]
    vectors = DictVectorizer()
    features = vectors.fit_transform(_neighbourhoods(train))
    features.indices, features.indptr = features.indices.astype("int32"), features.indptr.astype("int32")
    svm = LinearSVC(C=0.3, random_state=0).fit(features, [tag for row in train for tag in row["tags"]])
    return {
        "most frequent tag": float((right == usual).mean()),
        "most frequent tag of each word": float((right == by_word).mean()),
        "linear SVM on five words": float((right == svm.predict(vectors.transform(_neighbourhoods(val)))).mean()),
    }


def _neighbourhoods(rows: Sequence[Any]) -> list[dict[str, int]]:
    """Return features of each word and of two words on each side: spelling, kinds of characters, last character."""
    found = []
    for row in rows:
        words = [None, None, *row["tokens"], None, None]
        for n in range(len(row["tokens"])):
            features = {"from start": min(n, 5), "from end": min(len(row["tokens"]) - n, 5)}
            for place, word in enumerate(words[n : n + 5]):
                kinds = "".join("9" if c.isdigit() else "a" if c.isalpha() else c for c in word or "")[:6]
                features |= {f"{place} {each}": 1 for each in (_plain(word or ""), f"kinds {kinds}", (word or " ")[-1])}
            found.append(features)
    return found


def answers() -> dict[str, float]:
    """Return the exact match of the words at the most usual place of the answers to each question."""
    places: dict[str, Counter[tuple[int, int]]] = defaultdict(Counter)
    for row in _rows(packaged.QUESTIONS_TRAIN):
        n_words, start = len(row["context"].split()), row["context"][: row["answers"]["answer_start"][0]].count(" ")
        for first in (start, start - n_words):  # counted from the start, and from the end
            places[row["question"]][first, len(row["answers"]["text"][0].split())] += 1
    scores = []
    for row in _rows(packaged.QUESTIONS_VAL):
        first, size = places[row["question"]].most_common(1)[0][0]
        words = row["context"].split()
        start = first if first >= 0 else max(len(words) + first, 0)
        scores.append(exact_match(" ".join(words[start : start + size]), row["answers"]["text"]))
    return {"most usual place of the answers to a question": float(np.mean(scores))}


def choices() -> dict[str, float]:
    """Return the share of held-out rows in which a linear model of the training sentences chooses the right one."""
    sentences, labels = zip(*read(packaged.MOVIES_TRAIN), strict=True)
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), min_df=2), LogisticRegression(max_iter=1000))
    model.fit(sentences, labels)
    rows = _rows(packaged.CHOICES_VAL)
    chosen = [int(np.argmax(model.decision_function(row["choices"]))) for row in rows]
    right = [choice == row["label"] for choice, row in zip(chosen, rows, strict=True)]
    return {"chance": 1 / len(rows[0]["choices"]), "TF-IDF with logistic regression": float(np.mean(right))}


def masked_tokens() -> dict[str, float]:
    """Return the share of held-out tokens that equal the most frequent token of the training texts."""
    packaged.prepare(packaged.MINILM, packaged.MOVIES_TRAIN)
    tokenizer = AutoTokenizer.from_pretrained(packaged.MINILM)
    counts = [
        Counter(token for ids in tokenizer(_texts(path), add_special_tokens=False)["input_ids"] for token in ids)
        for path in (packaged.MOVIES_TRAIN, packaged.MOVIES_VAL)
    ]
    (usual, _), *_ = counts[0].most_common(1)
    return {f"most frequent token ({tokenizer.decode([usual])!r})": counts[1][usual] / counts[1].total()}


def digits() -> dict[str, float]:
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


def _rows(path: Path) -> list[Any]:
    packaged.prepare(path)
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _texts(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return [row["text"] for row in csv.DictReader(file)]


def _plain(word: str) -> str:
    return word.lower().strip(_AROUND)


if __name__ == "__main__":
    main()
