"""Write malformed data files, read each, and print a Markdown table of what `read_rows` says about them.

    .venv/bin/python scripts/malformed_files.py

`tests/test_malformed_files.py` checks the important words of each message.
"""

import bz2
import gzip
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ftaccum.errors import DataError, SettingsError
from ftaccum.tasks.reading.options import ReadingOptions
from ftaccum.tasks.reading.rows import read_rows

GOOD = "text,label\ngood,1\nbad,0\n"


@dataclass(frozen=True)
class Case:
    """A file that cannot be read.

    Attributes:
        fault: what is wrong, in words.
        name: the name to read, in the folder of the case.
        content: its bytes or text; or a function that writes what is needed into the folder.
        words: what the message must say.
    """

    fault: str
    name: str
    content: str | bytes | Callable[[Path], None]
    words: tuple[str, ...]
    options: ReadingOptions = field(default_factory=ReadingOptions)

    def message(self, folder: Path) -> str:
        """Write the file, try to read it, and return the message, with the file's name instead of its path."""
        if callable(self.content):
            self.content(folder)
        else:
            data = self.content.encode() if isinstance(self.content, str) else self.content
            (folder / self.name).write_bytes(data)
        try:
            rows = read_rows(self.source(folder), self.options)
        except (DataError, SettingsError) as error:
            return str(error).replace(f"{folder}/", "")
        return f"NO ERROR: {rows[:] if isinstance(rows, datasets.Dataset) else list(rows)}"

    def source(self, folder: Path) -> str:
        return ",".join(str(folder / name) for name in self.name.split(","))


def _parquet(table: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def _write(**files: str) -> Callable[[Path], None]:
    """Return a function that writes files into a folder; _ stands for the dot in their names."""

    def write(folder: Path) -> None:
        for name, text in files.items():
            (folder / name.replace("_", ".")).write_text(text)

    return write


def _subfolder(folder: Path) -> None:
    (folder / "notes").mkdir()
    (folder / "notes" / "readme.md").write_text("Notes.")


def _no_classes(folder: Path) -> None:
    from PIL import Image

    (folder / "cats").mkdir()
    Image.new("RGB", (2, 2)).save(folder / "cats" / "1.png")


ROWS = pa.table({"text": ["good"], "label": [1]})
LINES = '{"text": "good", "label": 1}\n'
CASES = [
    Case("mistyped name", "trian.csv", _write(train_csv=GOOD), ("no such file", "Did you mean 'train.csv'?")),
    Case("a missing folder", "data/train.csv", _write(), ("there is no folder", "Check the path")),
    Case("empty file", "train.csv", "", ("the file is empty",)),
    Case("blank lines only", "train.csv", "\n\n", ("the file is empty",)),
    Case("header without rows", "train.csv", "text,label\n", ("a header (text, label), but no rows",)),
    Case(
        "row with too many fields",
        "train.csv",
        "text,label\ngood,1\nwell, then,0\n",
        ("line 3", "this row has 3 fields, but the header has 2 (text, label)", "double quotes", "`--delimiter`"),
    ),
    Case("row with too few fields", "train.csv", "text,label\ngood\n", ("line 2", "1 field,", "Add the missing")),
    Case(
        "quote that is never closed",
        "train.csv",
        'text,label\ngood,1\n"bad,0\nfine,1\n',
        ("from line 3 on", "never closed"),
    ),
    Case(
        "quote inside a quoted field",
        "train.csv",
        'text,label\n"so" good,1\n',
        ("line 2", "',' expected after '\"'", "twice"),
    ),
    Case(
        "another delimiter",
        "train.csv",
        "text;label\ngood;1\n",
        ("line 1", "contains ';'", "`--delimiter ';'`"),
        ReadingOptions(delimiter=","),
    ),
    Case("commas in a TSV file", "train.tsv", GOOD, ("contains ','", "`--delimiter ','`")),
    Case(
        "two columns of one name", "train.csv", "text,label,text\na,1,b\n", ("line 1", "2 columns have the name 'text'")
    ),
    Case("a column without a name", "train.csv", "text,,label\na,b,1\n", ("line 1", "column 2 has no name")),
    Case(
        "damaged UTF-8",
        "train.csv",
        "text,label\né à ü,1\n".encode() + b"n\xc3,0\n",
        ("line 3", "byte 0xc3", "utf-8", "`--encoding`"),
    ),
    Case(
        "another encoding",
        "train.csv",
        b"text,label\ngood,1\ncaf\xe9,0\n",
        ("line 3", "byte 0xe9", "`--encoding cp1252`"),
        ReadingOptions(encoding="utf-8"),
    ),
    Case("zero bytes", "train.csv", "text,label\ngood,1\n".encode("utf-16-le"), ("line 1", "zero byte", "utf-16-le")),
    Case("JSON syntax", "train.json", '[{"text": "good"},\n {"text": bad}]', ("line 2, column 11", "Expecting value")),
    Case("JSON lines syntax", "train.jsonl", LINES + '{"text": "bad"\n', ("line 2, column", "Expecting ',' delimiter")),
    Case("a line that is no object", "train.jsonl", LINES + '["bad", 0]\n', ("line 2", "a list instead of an object")),
    Case(
        "a column that changes its type",
        "train.jsonl",
        LINES + LINES + '{"text": "bad", "label": "0"}\n',
        ("line 3", "column 'label' is text here, but a number in the rows before"),
    ),
    Case(
        "JSON without rows",
        "train.json",
        '{"name": "reviews", "size": 2, "tags": []}',
        ("'name', 'size', 'tags'", "list of objects"),
    ),
    Case("columns of different lengths", "train.json", '{"text": ["a", "b"], "label": [1]}', ("'text' 2, 'label' 1",)),
    Case(
        "damaged gzip",
        "train.csv.gz",
        gzip.compress(GOOD.encode())[:-12],
        (".gz data are damaged or cut off", "Copy or download"),
    ),
    Case("not gzip", "train.csv.gz", GOOD, ("Not a gzipped file", "remove .gz from its name")),
    Case("damaged bzip2", "train.csv.bz2", bz2.compress(GOOD.encode())[:-9], (".bz2 data are damaged or cut off",)),
    Case("not Parquet", "train.parquet", GOOD, ("not a sound Parquet file", "Parquet magic bytes not found")),
    Case("Parquet without rows", "train.parquet", _parquet(ROWS.slice(1)), ("it has no rows",)),
    Case("Parquet with the name of CSV", "train.csv", _parquet(ROWS), ("a Parquet file, not a CSV file", "suffix")),
    Case(
        "Excel with the name of CSV",
        "train.csv",
        b"PK\x03\x04" + bytes(20),
        ("zip archive or an Excel sheet", "save the sheet as CSV"),
    ),
    Case("a web page", "train.json", "<!DOCTYPE html><html></html>", ("a web page", "Download the file itself")),
    Case("unknown suffix", "train.xlsx", b"PK\x03\x04", ("the suffix .xlsx", ".csv, .tsv, .json, .jsonl")),
    Case("files of several kinds", "", _write(a_csv=GOOD, b_jsonl=LINES), ("several kinds", "a.csv (CSV)", "*.csv'")),
    Case("folder without data", "notes", _subfolder, ("without data files", "readme.md", "save_to_disk")),
    Case(
        "files of different columns",
        "",
        _write(a_csv=GOOD, b_csv="text,stars\ngood,1\n"),
        ("b.csv", "no column 'label'", "a.csv"),
    ),
    Case("images without classes", "", _no_classes, ("has images, but no classes", "sub-folder")),
    Case(
        "sources of different columns",
        "a.csv,b.jsonl",
        _write(a_csv=GOOD, b_jsonl='{"text": "a", "stars": 1}'),
        ("b.jsonl' has no column 'label'", "a.csv' has"),
    ),
    Case(
        "sources of different types",
        "a.csv,b.jsonl",
        _write(a_csv=GOOD, b_jsonl='{"text": "a", "label": "good"}'),
        ("b.jsonl' has text in its column 'label'", "a.csv' has whole numbers"),
    ),
    Case(
        "one weight for two sources",
        "a.csv,a.csv",
        _write(a_csv=GOOD),
        ("has 1 number", "2 sources"),
        ReadingOptions(train_data_weights="1"),
    ),
]


def main() -> None:
    logging.disable()
    datasets.disable_progress_bars()
    print("| fault | file | message |\n| --- | --- | --- |")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            datasets.config.HF_DATASETS_CACHE = Path(folder) / ".cache"
            message = case.message(Path(folder)).replace("|", "\\|").replace(folder, "data")
            print(f"| {case.fault} | {case.name or 'data'} | {message} |")


if __name__ == "__main__":
    main()
