"""Tokenizing before training: in several processes, and stored so that later runs find the tokens."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from transformers import AutoTokenizer

from ftaccum import DataError, test_fine_tuning
from ftaccum.data.convert import as_rows
from ftaccum.data.dataset import Rows
from ftaccum.data.text_columns import TextColumns
from ftaccum.data.text_encoder import TextEncoder
from ftaccum.data.tokenize import tokenize
from ftaccum.tasks.reading.rows import read_rows
from silent_errors.text_columns import causal_lm, word_tokenizer

NAMES = SimpleNamespace(label2id={"bad": 0, "good": 1}, id2label={0: "bad", 1: "good"})
COLUMNS = TextColumns(("text",), "label", ())


def write(folder: Path, labels: Sequence[str] = ("good", "bad") * 4) -> str:
    lines = [f"a {label} film,{label}\n" for label in labels]
    (folder / "rows.csv").write_text("text,label\n" + "".join(lines))
    return str(folder / "rows.csv")


def tokens(file: str, tokenizer: Any, config: Any = NAMES, n_processes: int = 1) -> Rows:
    rows = as_rows(read_rows(file), "train_data")
    encoder = TextEncoder(tokenizer, 5, None)
    return tokenize(rows, COLUMNS, encoder, config, next_token=False, warns=False, n_processes=n_processes)


def never(*_arguments: Any) -> Any:
    raise AssertionError("tokenized again")


def saved_tokenizer(folder: Path) -> Path:
    word_tokenizer().save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def test_tokens_are_found_again_with_a_tokenizer_that_was_loaded_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = write(tmp_path), saved_tokenizer(tmp_path)
    first = tokens(file, AutoTokenizer.from_pretrained(folder))
    monkeypatch.setattr(TextEncoder, "__call__", never)
    used = AutoTokenizer.from_pretrained(folder)
    used(["a good film", "a"], padding=True, truncation=True, max_length=2)  # changes the state of a fast tokenizer
    same_classes = SimpleNamespace(
        label2id=dict(reversed(NAMES.label2id.items())), id2label=NAMES.id2label, dropout=0.5
    )
    again = tokens(file, used, same_classes)
    assert again.fetch(range(8)) == first.fetch(range(8))
    assert first.fetch([0])[0]["labels"] == 1


def test_tokens_are_made_again_for_other_rows_tokenizers_and_classes(tmp_path: Path) -> None:
    file, folder = write(tmp_path), saved_tokenizer(tmp_path)
    first = tokens(file, AutoTokenizer.from_pretrained(folder)).fetch(range(8))
    swapped = SimpleNamespace(label2id={"bad": 1, "good": 0}, id2label={0: "good", 1: "bad"})
    labels = [row["labels"] for row in tokens(file, AutoTokenizer.from_pretrained(folder), swapped).fetch(range(8))]
    assert labels == [1 - row["labels"] for row in first]
    lower = AutoTokenizer.from_pretrained(folder)
    lower.add_tokens(["film"])
    lower.add_tokens(["a good"])
    assert tokens(file, lower).fetch([0])[0]["input_ids"] != first[0]["input_ids"]
    write(tmp_path, ["bad"] * 8)
    assert [row["labels"] for row in tokens(file, AutoTokenizer.from_pretrained(folder)).fetch(range(8))] == [0] * 8


def test_several_processes_give_the_same_tokens(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path)
    several = tokens(file, word_tokenizer(), n_processes=2)
    assert "Tokenizing train_data (num_proc=2)" in capfd.readouterr().err
    (tmp_path / "alone").mkdir()
    unnamed = SimpleNamespace(label2id=NAMES.label2id, id2label=None)  # hashes otherwise
    assert several.fetch(range(8)) == tokens(file, word_tokenizer(), unnamed).fetch(range(8))


def test_an_error_in_another_process_names_the_row(tmp_path: Path) -> None:
    file = write(tmp_path, ["good"] * 7 + ["odd"])
    with pytest.raises(DataError, match="In `train_data`, row 7 has the label 'odd'"):
        tokens(file, word_tokenizer(), n_processes=2)


def test_a_tokenizer_that_cannot_be_sent_to_another_process_is_refused(tmp_path: Path) -> None:
    class Stuck:
        """A tokenizer that cannot be pickled."""

        def __call__(self, *_texts: Any, **_options: Any) -> Any:
            raise NotImplementedError

        def __reduce__(self) -> Any:
            raise TypeError("cannot be pickled")

    with pytest.raises(DataError, match=r"cannot be tokenized in 2 processes.*Leave out `preprocessing_num_workers`"):
        tokens(write(tmp_path), Stuck(), n_processes=2)


def test_the_setting_reaches_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    encoded = Rows.encoded

    def count(self: Rows, encode: Any, columns: Any, n_processes: int = 1) -> Rows:
        asked.append(n_processes)
        return encoded(self, encode, columns)

    monkeypatch.setattr(Rows, "encoded", count)
    model: nn.Module = causal_lm()
    rows = read_rows(write(tmp_path)).remove_columns("label")
    arguments: dict[str, Any] = {"tokenizer": word_tokenizer(), "progress": False, "max_updates": 1, "audit": False}
    test_fine_tuning(model, train_data=rows, preprocessing_num_workers=3, **arguments)
    assert asked == [3]


@pytest.mark.slow
def test_a_second_run_of_a_program_does_not_tokenize(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "import sys\n"
        "sys.stderr.isatty = lambda: True  # so that bars are drawn\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from ftaccum import test_fine_tuning\n"
        "from ftaccum.tasks.reading.rows import read_rows\n"
        "from silent_errors.text_columns import causal_lm, word_tokenizer\n"
        f"rows = read_rows({write(tmp_path)!r}).remove_columns('label')\n"
        "test_fine_tuning(causal_lm(), train_data=rows, tokenizer=word_tokenizer(), max_updates=1, audit=False)\n"
    )
    environment = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    outputs = [
        subprocess.run([sys.executable, script], env={**os.environ, **environment}, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert [output.returncode for output in outputs] == [0, 0], outputs[0].stderr
    assert ["Tokenizing train_data" in output.stderr for output in outputs] == [True, False]
