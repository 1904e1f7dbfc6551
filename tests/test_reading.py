"""Reading rows: forms of files and folders, types of columns, the stored copy, several sources, and streams."""

import bz2
import gzip
import itertools
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value
from PIL import Image

from ftaccum import DataError, SettingsError
from ftaccum.tasks.reading.options import ReadingOptions
from ftaccum.tasks.reading.rows import columns_of, read_rows
from ftaccum.tasks.reading.sources import find_source

ROWS = [{"text": "good, really", "label": 1}, {"text": 'a "bad"\nfilm', "label": 0}, {"text": "café", "label": 1}]
CSV = 'text,label\n"good, really",1\n"a ""bad""\nfilm",0\ncafé,1\n'
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write(path: Path, content: str | bytes, encoding: str = "utf-8") -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return str(path)


def parquet(rows: list[dict[str, Any]] = ROWS) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


FORMS: dict[str, str | bytes] = {
    "rows.csv": CSV,
    "semicolons.csv": CSV.replace('","', ";").replace(",1", ";1").replace(",0", ";0").replace("text,", "text;"),
    "bars.csv": CSV.replace("text,", "text|").replace(",1", "|1").replace(",0", "|0"),
    "with_bom.csv": CSV.encode("utf-8-sig"),
    "windows.csv": CSV.replace("\n", "\r\n").replace("\r\nfilm", "\nfilm"),
    "utf16.csv": CSV.encode("utf-16"),
    "western.csv": CSV.encode("cp1252"),
    "rows.TSV": CSV.replace("text,", "text\t").replace(",1", "\t1").replace(",0", "\t0"),
    "list.json": json.dumps(ROWS, indent=2),
    "data.json": json.dumps({"version": 2, "data": ROWS}),
    "columns.json": json.dumps({"text": [row["text"] for row in ROWS], "label": [row["label"] for row in ROWS]}),
    "lines.json": LINES,
    "lines.jsonl": LINES,
    "rows.parquet": parquet(),
    "rows.csv.gz": gzip.compress(CSV.encode()),
    "rows.jsonl.bz2": bz2.compress(LINES.encode()),
    "rows.csv.xz": lzma.compress(CSV.encode()),
    "rows.json.zst": pa.compress(json.dumps(ROWS).encode(), codec="zstd", asbytes=True),
    "rows.parquet.gz": gzip.compress(parquet()),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_all_forms_of_a_file_give_the_same_rows(name: str, streaming: bool, tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / name, FORMS[name]), ReadingOptions(streaming=streaming))
    assert isinstance(rows, IterableDataset if streaming else Dataset)
    assert rows.column_names == columns_of(rows) == ["text", "label"]
    assert list(rows) == ROWS


def test_a_line_of_a_text_file_is_a_row(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "corpus.txt", "one\r\n\r\nthree, with é\nfour"))
    assert rows["text"][:] == ["one", "", "three, with é", "four"]


def test_given_delimiter_and_encoding_are_used(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.csv", "text:label\nпривет, мир:1\n", "koi8-r")
    rows = read_rows(file, ReadingOptions(delimiter=":", encoding="koi8-r"))
    assert rows[:] == {"text": ["привет, мир"], "label": [1]}
    rows = read_rows(write(tmp_path / "tabs.csv", "text\tlabel\na,b\t1\n"), ReadingOptions(delimiter="tab"))
    assert rows[:] == {"text": ["a,b"], "label": [1]}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"delimiter": "::"}, "`delimiter` must be one character"),
        ({"encoding": "klingon"}, "`encoding` must be a text encoding"),
        ({"encoding": "base64"}, "`encoding` must be a text encoding"),
        ({"train_data_weights": "0.7;0.3"}, "`train_data_weights` must be positive numbers"),
        ({"train_data_weights": [1, 0]}, "`train_data_weights` must be positive numbers"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        read_rows("absent.csv", ReadingOptions(**options))


def test_text_that_looks_like_a_missing_value_or_a_number_stays_text(tmp_path: Path) -> None:
    texts = ["NA", "null", "None", "nan", "N/A", "001", "1", "true", "-"]
    file = write(tmp_path / "rows.csv", "text,label\n" + "".join(f"{text},{n}\n" for n, text in enumerate(texts)))
    assert read_rows(file)["text"][:] == texts


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["0", "-12", "3"], [0, -12, 3]),
        (["0", "1.5", "-2e3", ".5", "1."], [0.0, 1.5, -2000.0, 0.5, 1.0]),
        (["True", "false"], [True, False]),
        (["1", "", "2"], [1, None, 2]),
        (["a", "", "b"], ["a", None, "b"]),
        (["", ""], [None, None]),
        (["007", "8"], ["007", "8"]),
        (["1", "0x1F"], ["1", "0x1F"]),
        (["12345678901234567890", "1"], ["12345678901234567890", "1"]),
        (["1", "NA"], ["1", "NA"]),
        (["1", "True"], ["1", "True"]),
        (["٣", "4"], ["٣", "4"]),
        (["1_000", "2"], ["1_000", "2"]),
        (["inf", "1"], ["inf", "1"]),
    ],
)
def test_the_type_of_a_csv_column_fits_all_its_cells(cells: list[str], values: list[Any], tmp_path: Path) -> None:
    file = write(tmp_path / "rows.csv", "text,value\n" + "".join(f"a,{cell}\n" for cell in cells))
    found = read_rows(file)["value"][:]
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


def test_types_follow_all_rows_and_not_the_first_thousands(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.csv", "text,value\n" + "7,7\n" * 2500 + "seven,7.5\n")
    rows = read_rows(file)
    assert rows.features == Features({"text": Value("string"), "value": Value("float64")})
    assert rows[2500] == {"text": "seven", "value": 7.5}


def test_named_text_columns_of_numbers_are_text(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "rows.csv", "text,label\n12,1\n7,0\n"), text_columns=["text"])
    assert rows[:] == {"text": ["12", "7"], "label": [1, 0]}


def messages(monkeypatch: pytest.MonkeyPatch, level: str = "info") -> list[str]:
    """Return a list to which the messages of the logger are added."""
    found: list[str] = []
    monkeypatch.setattr(f"ftaccum.runtime.log.logger.{level}", found.append)
    return found


def test_a_log_line_says_why_a_column_of_numbers_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = messages(monkeypatch)
    read_rows(write(tmp_path / "rows.csv", "text,label\n" + "a,1\n" * 6 + "b,NA\n"))
    (line,) = found
    assert "column 'label' is text, because it has 'NA' in line 8" in line


def test_a_log_line_says_that_a_file_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = messages(monkeypatch)
    read_rows(write(tmp_path / "rows.csv", "text,label\ngood,1\ncafé,0\n", "cp1252"))
    (line,) = found
    assert "not UTF-8 (byte 0xe9 in line 3), so it is read as cp1252" in line
    read_rows(write(tmp_path / "control.csv", b"text,label\ncaf\xe9 \x81,0\n"))
    assert "read as latin-1" in found[1]


def test_long_files_are_looked_at_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftaccum.tasks.reading.encodings._CHUNK", 7)
    assert read_rows(write(tmp_path / "a.csv", "text,label\n" + "éß€😀,1\n" * 9))["text"][:] == ["éß€😀"] * 9
    with pytest.raises(DataError, match="line 11: it has a zero byte"):
        read_rows(write(tmp_path / "b.csv", "text,label\n" + "a,1\n" * 9 + "\0,1\n"))
    with pytest.raises(DataError, match="line 9: byte 0xc3 is not utf-8"):
        read_rows(write(tmp_path / "c.csv", b"text,label\n" + "éß€😀,1\n".encode() * 7 + b"\xc3,1\n"))


def test_the_index_that_pandas_writes_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = messages(monkeypatch)
    pd.DataFrame(ROWS).drop(1).to_csv(tmp_path / "rows.csv")
    rows = read_rows(str(tmp_path / "rows.csv"))
    assert list(rows) == [ROWS[0], ROWS[2]]
    assert "left out" in found[0]
    with pytest.raises(DataError, match="line 1: column 1 has no name"):
        read_rows(write(tmp_path / "other.csv", ",label\ngood,1\n"))


def test_a_field_may_be_longer_than_the_default_of_python(tmp_path: Path) -> None:
    long = "word " * 40_000
    assert read_rows(write(tmp_path / "rows.csv", f"text,label\n{long},1\n"))["text"][0] == long


def test_json_objects_keep_their_own_keys(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "hi"}], "size": 1, "extra": {"a": 1}},
        {"messages": [{"role": "user", "content": "2", "tool_calls": [{"x": "y"}]}], "size": 2.5, "extra": {"a": "b"}},
        {"messages": None, "size": None, "extra": {}},
    ]
    for streaming in (False, True):
        file = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        assert list(read_rows(file, ReadingOptions(streaming=streaming))) == rows


def test_equal_json_objects_are_structs_and_absent_keys_are_null(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "rows.jsonl", '{"a": {"b": 1}, "c": [1, 2]}\n{"a": {"b": 2}, "d": "x"}\n'))
    assert rows.features["a"] == {"b": Value("int64")}
    assert rows[0] == {"a": {"b": 1}, "c": [1, 2], "d": None}


def test_json_objects_of_other_forms_may_come_late(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"a": {"b": 1}}] * 1000 + [{"a": {"b": 2.5, "c": [None]}}] * 3
    file = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_rows(file)) == rows


def test_one_of_several_lists_in_a_document_is_chosen_by_the_split(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.json", json.dumps({"train": ROWS[:1], "validation": ROWS[1:]}))
    assert list(read_rows(file)) == ROWS[:1]
    assert list(read_rows(file, split="validation", argument="val_data")) == ROWS[1:]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_a_file_that_was_rewritten_is_read_again(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    read_rows(write(file, FORMS.get(name, LINES)))
    dates = file.stat()
    changed = {"rows.csv": CSV.replace("good", "fine"), "rows.jsonl": LINES.replace("good", "fine")}
    write(file, changed.get(name) or parquet([{**row, "text": row["text"].replace("good", "fine")} for row in ROWS]))
    os.utime(file, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    assert read_rows(str(file))["text"][0] == "fine, really"


def test_unchanged_files_are_stored_once_wherever_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_rows(write(tmp_path / "a.csv", CSV))
    monkeypatch.setattr("ftaccum.tasks.reading.csv_table.CsvTable.schema", None)
    again = read_rows(write(tmp_path / "b.csv", CSV))
    assert again.cache_files == first.cache_files
    assert list(again) == ROWS
    monkeypatch.undo()


def test_other_options_give_other_rows(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.csv", "a;b,c\n1;2,3\n")
    assert read_rows(file, ReadingOptions(delimiter=";")).column_names == ["a", "b,c"]
    assert read_rows(file, ReadingOptions(delimiter=",")).column_names == ["a;b", "c"]


def test_a_folder_and_a_pattern_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name, n in (("b.csv", 2), ("a.csv", 1), ("more/c.csv", 3), (".hidden.csv", 4)):
        write(tmp_path / name, f"text,label\n{n},{n}\n" if n < 3 else f"label,text\n{n},x\n")
    write(tmp_path / "README.md", "Notes.")
    assert read_rows(str(tmp_path))[:] == {"text": ["1", "2", "x"], "label": [1, 2, 3]}
    assert read_rows(str(tmp_path / "?.csv"))[:] == {"text": [1, 2], "label": [1, 2]}
    with pytest.raises(DataError, match="matches no file"):
        read_rows(str(tmp_path / "*.parquet"))


def test_files_of_splits_in_a_folder_are_not_mixed(tmp_path: Path) -> None:
    for n, name in enumerate(("train-0.csv", "train-1.csv", "test.csv", "dev.csv")):
        write(tmp_path / name, f"text,label\na,{n}\n")
    assert read_rows(str(tmp_path))["label"][:] == [0, 1]
    assert read_rows(str(tmp_path), split="validation", argument="val_data")["label"][:] == [3]
    assert read_rows(f"{tmp_path}@test")["label"][:] == [2]
    (tmp_path / "dev.csv").unlink()
    with pytest.raises(DataError, match="files for test, train, but not for 'validation'"):
        read_rows(str(tmp_path), split="validation", argument="val_data")


def test_saved_folders_are_read_by_split(tmp_path: Path) -> None:
    saved = DatasetDict(train=Dataset.from_list(ROWS[:2]), test=Dataset.from_list(ROWS[2:]))
    saved.save_to_disk(tmp_path / "both")
    saved["test"].save_to_disk(tmp_path / "one")
    assert list(read_rows(str(tmp_path / "both"))) == ROWS[:2]
    assert list(read_rows(f"{tmp_path / 'both'}@test", ReadingOptions(streaming=True))) == ROWS[2:]
    assert list(read_rows(str(tmp_path / "one"))) == ROWS[2:]
    with pytest.raises(DataError, match=r"no split 'dev', but 'train', 'test'. Choose one as .*@train"):
        read_rows(f"{tmp_path / 'both'}@dev")
    (tmp_path / "both" / "dataset_dict.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read: Expecting property name"):
        read_rows(str(tmp_path / "both"))
    saved["test"].select([]).save_to_disk(tmp_path / "none")
    with pytest.raises(DataError, match="has no rows"):
        read_rows(str(tmp_path / "none"))


def test_folders_of_images_have_the_classes_of_their_sub_folders(tmp_path: Path) -> None:
    for name, color in (("cats", 10), ("dogs", 200)):
        (tmp_path / name).mkdir()
        Image.new("L", (2, 2), color).save(tmp_path / name / "1.png")
    rows = read_rows(str(tmp_path))
    assert rows.features["label"] == ClassLabel(names=["cats", "dogs"])
    assert [(row["image"].getpixel((0, 0)), row["label"]) for row in rows] == [(10, 0), (200, 1)]
    assert len(read_rows(str(tmp_path), argument="val_data", split="validation")) == 2
    with pytest.raises(DataError, match="has no split 'test', but 'train'"):
        read_rows(f"{tmp_path}@test")
    Image.new("L", (2, 2), 30).save(tmp_path / "cats" / "1.png")
    assert read_rows(str(tmp_path))[0]["image"].getpixel((0, 0)) == 30
    (tmp_path / "cats" / "2.png").touch()
    with pytest.raises(DataError, match=r"cats/2\.png': the image is empty"):
        read_rows(str(tmp_path))


def test_parquet_keeps_class_names_and_gives_categories_as_text(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    Dataset.from_list(ROWS, features=features).to_parquet(str(tmp_path / "a.parquet"))
    assert read_rows(str(tmp_path / "a.parquet")).features == features
    pd.DataFrame({"text": ["x"], "kind": pd.Categorical(["y"])}).to_parquet(tmp_path / "b.parquet")
    assert read_rows(str(tmp_path / "b.parquet")).features == Features(dict.fromkeys(("text", "kind"), Value("string")))


def test_spaces_after_delimiters_belong_to_no_field(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", 'text, "label", n\n"a, b", "good", 1\nc, bad, 2\n')
    assert list(read_rows(file)) == [{"text": "a, b", "label": "good", "n": 1}, {"text": "c", "label": "bad", "n": 2}]


def test_quotes_that_join_rows_of_a_tsv_file_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = messages(monkeypatch, "warning")
    joined = read_rows(write(tmp_path / "a.tsv", 'text\tlabel\n"Good\t1\nbad\t0\nof 5"\t1\nlast\t0\n'))
    assert len(joined) == 2
    assert "1 quoted field contains tabs and line ends (the first is in the row from line 2 on)" in " ".join(logged)
    logged.clear()
    assert len(read_rows(write(tmp_path / "b.tsv", 'text\tlabel\n"Good\nfilm"\t1\n"a\tb"\t0\n'))) == 2
    assert not logged


@pytest.mark.parametrize("names", [["good", "bad"], None])
def test_parquet_files_whose_class_numbers_differ_are_refused(names: list[str] | None, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for n, classes in enumerate((["bad", "good"], names)):
        features = Features(
            {"text": Value("string"), "label": ClassLabel(names=classes) if classes else Value("int64")}
        )
        Dataset.from_list(ROWS, features=features).to_parquet(str(tmp_path / "rows" / f"{n}.parquet"))
    with pytest.raises(DataError, match=r"1\.parquet': column 'label' has .*, but .*bad.* in .*0\.parquet"):
        read_rows(str(tmp_path / "rows"))


def sources(folder: Path) -> str:
    a = write(folder / "a.csv", "text,label\n" + "".join(f"a{n},{n}\n" for n in range(60)))
    b = write(folder / "b.jsonl", "".join(json.dumps({"label": n + 0.5, "text": f"b{n}"}) + "\n" for n in range(30)))
    return f"{a},{b}"


def test_sources_without_weights_follow_each_other(tmp_path: Path) -> None:
    rows = read_rows(sources(tmp_path))
    assert rows["text"][:] == [f"a{n}" for n in range(60)] + [f"b{n}" for n in range(30)]
    assert rows["label"][59:61] == [59.0, 0.5]
    assert list(read_rows(sources(tmp_path).split(","), ReadingOptions(streaming=True))) == list(rows)


@pytest.mark.parametrize(
    ("limit", "from_a", "from_b"), [(12, 8, 4), (1, 1, 0), (89, 60, 29), (90, 60, 30), (99, 60, 30)]
)
def test_a_limit_takes_the_first_rows_of_each_source_in_proportion(
    limit: int, from_a: int, from_b: int, tmp_path: Path
) -> None:
    for argument in ("train_data", "val_data"):
        rows = read_rows(sources(tmp_path), argument=argument, limit=limit)
        assert rows["text"][:] == [f"a{n}" for n in range(from_a)] + [f"b{n}" for n in range(from_b)]


def test_a_limit_takes_the_first_rows_of_mixed_sources_and_of_a_stream(tmp_path: Path) -> None:
    mixing, stream = ReadingOptions(train_data_weights="3,1"), ReadingOptions(streaming=True)
    assert read_rows(sources(tmp_path), mixing, limit=9)["text"][:] == read_rows(sources(tmp_path), mixing)["text"][:9]
    assert [row["text"] for row in read_rows(sources(tmp_path), stream, limit=3)] == ["a0", "a1", "a2"]


def test_a_limit_takes_the_first_images_of_each_class_in_proportion(tmp_path: Path) -> None:
    for name, n_images in (("cats", 4), ("dogs", 2), ("eels", 2)):
        (tmp_path / name).mkdir()
        for n in range(n_images):
            Image.new("L", (2, 2), 10 * n).save(tmp_path / name / f"{n}.png")
    rows = read_rows(str(tmp_path), limit=4)
    assert [(row["label"], row["image"].getpixel((0, 0))) for row in rows] == [(0, 0), (0, 10), (1, 0), (2, 0)]
    both = read_rows(f"{tmp_path},{tmp_path}", limit=8, argument="val_data")
    assert both["label"][:] == [0, 0, 1, 2] * 2


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_mix_sources_until_one_ends(streaming: bool, tmp_path: Path) -> None:
    def mixed(seed: int) -> list[str]:
        options = ReadingOptions(train_data_weights="3,1", streaming=streaming)
        return [row["text"] for row in read_rows(sources(tmp_path), options, seed=seed)]

    texts = mixed(0)
    assert texts == mixed(0) != mixed(1)
    from_a, from_b = ([text for text in texts if text[0] == name] for name in "ab")
    assert from_a == [f"a{n}" for n in range(60)]  # the first to end, and no row repeats
    assert from_b == [f"b{n}" for n in range(len(from_b))]
    assert 10 <= len(from_b) < 30
    assert [*itertools.islice(texts, 60)] != from_a


def test_validation_data_are_not_mixed_or_streamed(tmp_path: Path) -> None:
    options = ReadingOptions(train_data_weights="3,1", streaming=True)
    rows = read_rows(sources(tmp_path), options, argument="val_data", split="validation")
    assert isinstance(rows, Dataset)
    assert len(rows) == 90


def test_a_file_with_a_comma_in_its_name_is_one_source(tmp_path: Path) -> None:
    assert len(read_rows(write(tmp_path / "a,b.csv", CSV))) == 3


def test_a_stream_reads_no_more_than_is_asked_for(tmp_path: Path) -> None:
    good = "text,label\n" + "a,1\n" * 12_000
    rows = read_rows(write(tmp_path / "rows.csv", good + "b,none\n"), ReadingOptions(streaming=True))
    assert len(list(rows.take(11_000))) == 11_000
    with pytest.raises(
        DataError, match=r"line 12002: column 'label' has 'none', but it has a whole number in the first"
    ):
        list(rows)
    more = "".join(json.dumps(row) + "\n" for row in [{"a": 1}] * 10_000 + [{"a": 1, "b": 2}])
    rows = read_rows(write(tmp_path / "rows.jsonl", more), ReadingOptions(streaming=True))
    with pytest.raises(DataError, match="line 10001: it has a column 'b', which the first rows do not have"):
        list(rows)


@pytest.mark.parametrize(
    "name", ["trian.csv", "./data", "/data/reviews", "~/reviews", "a/b/c", "data/*.csv", "x.jsonl.gz"]
)
def test_names_that_look_like_paths_are_not_looked_up_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no such file|no folder|matches no file"):
        find_source(name, "train", "train_data")


def test_names_of_the_hub_have_a_configuration_and_a_split() -> None:
    found = find_source("nyu-mll/glue:sst2@validation", "train", "train_data")
    assert (found.kind, found.name, found.config, found.split) == ("hub", "nyu-mll/glue", "sst2", "validation")
    found = find_source("imdb", "train", "train_data")
    assert (found.kind, found.name, found.config, found.split) == ("hub", "imdb", None, "train")


def hub(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    monkeypatch.setattr("ftaccum.tasks.reading.hub.datasets.load_dataset", load)


def test_hub_data_are_loaded_by_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*names: Any, **options: Any) -> Any:
        asked.append((names, options))
        return Dataset.from_list(ROWS)

    hub(monkeypatch, load)
    assert list(read_rows("nyu-mll/glue:sst2@test")) == ROWS
    assert asked == [(("nyu-mll/glue", "sst2"), {"split": "test", "streaming": False})]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("Couldn't reach the Hub."), "Couldn't reach the Hub. Check the network"),
        (ValueError("Config name is missing. Please pick one of ['a']"), r"Please pick one of \['a'\]. Give the conf"),
        (ValueError('Unknown split "train". Should be one of ["test"].'), "Should be one of .* as org/name@SPLIT"),
    ],
)
def test_faults_of_the_hub_have_its_reason_and_a_remedy(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_names: Any, **_options: Any) -> Any:
        raise error

    hub(monkeypatch, load)
    with pytest.raises(DataError, match=words):
        read_rows("org/name")


def test_a_hub_name_without_network_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews").mkdir()
    with pytest.raises(DataError, match=r"`train_data` 'revews' is no file or folder here.*Did you mean 'reviews'\?"):
        read_rows("revews")


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.csv", CSV)
    assert list(read_rows("~/rows.csv")) == ROWS


def test_a_full_disk_is_reported_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(write(tmp_path / "file", "x")))
    with pytest.raises(DataError, match=r"cannot be stored in .*HF_DATASETS_CACHE"):
        read_rows(write(tmp_path / "rows.csv", CSV))
