"""The options of a script that trains a module of its own on rows of texts."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from ..data.text_columns import check_column
from ..errors import DataError
from ..fields import PositiveInt, Text, setting
from .adapter_options import AdapterOptions
from .arguments import ModelArguments
from .model_source import ModelSource
from .reading.rows import read_rows


@dataclass
class TextOptions(ModelArguments, AdapterOptions):
    """The options of a model, its adapters and its data, for a script that trains a module of its own on texts.

    A script derives a dataclass with further options from it, and gives it to `run_script` as `own`:

        @dataclass
        class Options(ftaccum.TextOptions):
            scale: float = field(default=20.0, metadata={"help": "factor of the similarities"})

        def main(options):
            model, tokenizer = options.own.load(AutoModel)
            rows = options.own.read(("question", "answer"))  # test_fine_tuning(..., lora=options.own.lora_argument())
            ...

        ftaccum.run_script(main, own=Options, model="bert-base-uncased", train_data="train.csv")
    """

    train_data: Text = setting("", "CSV, JSON or Parquet file, folder or hub name[:config] (required)", "--data")
    val_data: Text | None = setting(None, "held-out rows, as for train_data; none: validation_split holds out rows")
    max_train_rows: PositiveInt | None = setting(None, "train on at most this many of the first rows; none: all")
    max_val_rows: PositiveInt | None = setting(None, "use at most this many of the first rows of val_data; none: all")

    def load(self, model_class: Any) -> tuple[Any, Any]:
        """Return the model and its tokenizer.

        Args:
            model_class: an auto class of Transformers, such as `AutoModel`.

        Raises:
            SettingsError: if one of them cannot be loaded.
        """
        named = ModelArguments(**{f.name: getattr(self, f.name) for f in fields(ModelArguments)})
        return ModelSource(named, model_class, AutoTokenizer).load()

    def read(self, columns: Sequence[str]) -> dict[str, Dataset]:
        """Return the rows by argument of `test_fine_tuning`: `train_data`, and `val_data` if it is given.

        Args:
            columns: columns in which each row must have a text.

        Raises:
            DataError: if the rows cannot be read, lack a column, or have no text in it.
        """
        rows = {"train_data": self._read("train_data", "train", columns, self.max_train_rows)}
        if self.val_data is not None:
            rows["val_data"] = self._read("val_data", "validation", columns, self.max_val_rows)
        return rows

    def _read(self, argument: str, split: str, columns: Sequence[str], limit: int | None) -> Dataset:
        source = getattr(self, argument)
        rows: Any = read_rows(source, argument=argument, split=split, text_columns=columns, limit=limit)
        for column in columns:
            check_column(rows, argument, column)
            for n, text in enumerate(rows[column]):
                if not isinstance(text, str) or not text.strip():
                    raise DataError(f"In `{argument}`, row {n} has no text in the column {column!r}. Remove the row.")
        return rows
