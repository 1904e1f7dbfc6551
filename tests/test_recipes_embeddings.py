"""The recipe for sentence embeddings: its pairs, its encoder, its metrics, and a complete run."""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModel, AutoTokenizer, EvalPrediction

from ftaccum import Result
from ftaccum.data.columns import ColumnRules
from ftaccum.data.padding import PaddingCollator
from recipe_runs import RECIPES, run_recipe
from task_files import save_encoder

PAIRS = [
    ("a good film", "good"), ("the very bad film", "bad"), ("the film", "a film"), ("not bad", "good film"),
    ("good good good film", "a"), ("negative", "not positive"), ("row1 row2 a film", "the row3"), ("film", "row4 row5"),
    ("a positive film", "positive"), ("the row6 film very very good", "row6"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _recipes_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(RECIPES), *sys.path])


@pytest.fixture
def recipe() -> ModuleType:
    import embeddings

    return embeddings


@pytest.fixture
def model(tmp_path: Path) -> str:
    return save_encoder(tmp_path / "encoder")


def save_pairs(file: Path, pairs: list[tuple[str, str]]) -> str:
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([("query", "answer"), *pairs])
    return str(file)


def embed(folder: str, texts: Sequence[str]) -> torch.Tensor:
    """Return the mean state of the tokens of each text, one at a time and so without padding."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = [encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state for text in texts]
    return torch.stack([each[0].mean(0) for each in states])


def test_retrieval_ranks_each_positive_among_those_with_another_label(recipe: ModuleType) -> None:
    random = np.random.default_rng(0)
    anchors, labels = random.normal(size=(40, 5)), np.arange(40)
    positives = anchors + random.normal(size=(40, 5))
    positives[7], labels[7] = positives[3], labels[3]  # the same text in two rows
    positives[12] = positives[11]  # as near as another text
    ranks = []
    for n in range(40):
        scores = [a @ anchors[n] / np.linalg.norm(a) for a in positives]
        ranks.append(1 + sum(scores[m] >= scores[n] for m in range(40) if labels[m] != labels[n]))
    found = recipe.retrieval(EvalPrediction((anchors * 4, positives * 2.0 ** (labels[:, None] % 3)), labels))
    assert 0 < found["recall@1"] < found["recall@10"] < 1
    assert found["recall@1"] == pytest.approx(np.mean([rank <= 1 for rank in ranks]))
    assert found["recall@10"] == pytest.approx(np.mean([rank <= 10 for rank in ranks]))
    assert found["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_embeddings_without_a_direction_find_nothing(recipe: ModuleType, value: float) -> None:
    embeddings, labels = np.full((20, 3), value), np.arange(20)
    found = recipe.retrieval(EvalPrediction((embeddings, embeddings), labels))
    assert found == pytest.approx({"recall@1": 0, "recall@10": 0, "mrr": 1 / 20})
    broken = np.eye(20)
    broken[4] = value  # one text of 20: it finds nothing, and all others find it first
    found = recipe.retrieval(EvalPrediction((broken, broken), labels))
    assert found == pytest.approx({"recall@1": 0, "recall@10": 19 / 20, "mrr": (19 / 2 + 1 / 20) / 20})


def test_an_embedding_depends_on_neither_padding_nor_other_rows(recipe: ModuleType, model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = Dataset.from_dict({"query": [a for a, _ in PAIRS], "answer": [b for _, b in PAIRS]})
    encoded = recipe.encode(rows, tokenizer, "query", "answer")
    encoder = recipe.PairEncoder(AutoModel.from_pretrained(model).double()).eval()
    batch = PaddingCollator(ColumnRules(), pad_token_id=tokenizer.pad_token_id)(encoded.to_list())
    assert batch.pop("labels").tolist() == list(range(len(PAIRS)))
    with torch.no_grad():
        together = encoder(**{name: values for name, values in batch.items() if "token_type" not in name})
    for side, texts in zip(("anchor", "positive"), zip(*PAIRS, strict=True), strict=True):
        torch.testing.assert_close(together[side].float(), embed(model, texts))


def test_rows_with_the_same_positive_have_the_same_label(recipe: ModuleType, model: str) -> None:
    rows = Dataset.from_dict({"query": ["a", "the", "not", "film"], "answer": ["good", "bad", "good", "very"]})
    encoded = recipe.encode(rows, AutoTokenizer.from_pretrained(model), "query", "answer")
    assert encoded["labels"] == [0, 1, 0, 2]


def embeddings_words(folder: Path) -> list[str]:
    pairs = save_pairs(folder / "pairs.csv", PAIRS)
    return ["--model", save_encoder(folder / "encoder"), "--train_data", pairs, "--val_data", pairs,
            "--anchor", "query", "--positive", "answer", "--batch_size", "3",
            "--effective_batch_size", "10"]  # fmt: skip


def test_embeddings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, words = tmp_path / "output", embeddings_words(tmp_path)
    model = words[1]
    words += ["--max_val_rows", "9", "--n_epochs", "3", "--learning_rate", "3e-3", "--progress", "no"]
    assert run_recipe("embeddings", *words, "--keep_checkpoints", "0", "--output_dir", str(output)) == 0
    result = Result.load(output)
    # Each pair is compared with all others of its update.
    anchors, positives = (embed(model, texts) for texts in zip(*PAIRS, strict=True))
    scores = 20 * F.cosine_similarity(anchors[:, None], positives[None], dim=-1)
    assert result.loss_history[0] == pytest.approx(F.cross_entropy(scores, torch.arange(len(PAIRS))).item(), rel=1e-5)
    assert result.loss_history[-1] < result.loss_history[0]
    found = ", ".join(f"{name} {value:.3f}" for name, value in result.metrics[-1].items())
    assert list(result.metrics[-1]) == ["recall@1", "recall@10", "mrr"]
    assert f"Held-out retrieval after training: {found}\n" in capsys.readouterr().out
    trained = embed(str(output / "model"), PAIRS[5])  # loads as an encoder with its tokenizer
    assert F.cosine_similarity(*trained, dim=0) != F.cosine_similarity(anchors[5], positives[5], dim=0)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"--scale": "0", "--model": "absent"}, "`scale` must be a positive number, but is 0.0 instead"),
        ({"--model": "absent"}, "`model` 'absent' cannot be loaded"),
        ({"--positive": "reply"}, "`train_data` has no column 'reply'"),
        ({"--train_data": "blank.csv"}, "In `train_data`, row 3 has no text in the column 'answer'"),
        ({"--max_length": "99"}, "`max_length` is 99, but the tokenizer and the model accept at most"),
    ],
)
def test_bad_input_is_reported_in_one_sentence(
    changed: dict[str, str], sentence: str, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "absent").mkdir()
    save_pairs(tmp_path / "pairs.csv", PAIRS)
    save_pairs(tmp_path / "blank.csv", [*PAIRS[:3], ("film", "")])
    given = {"--model": model, "--train_data": "pairs.csv", "--anchor": "query", "--positive": "answer"} | changed
    assert run_recipe("embeddings", *(word for pair in given.items() for word in pair)) == 2
    assert sentence in capfd.readouterr().err.replace("\n", " ")
