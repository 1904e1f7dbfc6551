"""The options of a model and of rows of texts, for a script that trains a module of its own on them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ..errors import DataError, refuse
from .adapter_options import AdapterOptions
from .arguments import ModelArguments, TrainDataArguments, ValDataArguments, WeightArguments, faults_of_val_data
from .reading.options import FileOptions, ReadingOptions

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class ModelAndDataOptions(
    ValDataArguments, TrainDataArguments, WeightArguments, ModelArguments, FileOptions, AdapterOptions
):
    """The options of a model, its adapters and its data, for a script that trains a module of its own on texts.

    A script derives a dataclass with further options from it, and gives it to `run_script` as `extra`:

        @dataclass
        class Options(ftaccum.ModelAndDataOptions):
            scale: float = field(default=20.0, metadata={"help": "factor of the similarities"})

        def main(options):
            model, tokenizer = options.extra.load(AutoModel)
            rows = options.extra.read(("question", "answer"))
            ...  # test_fine_tuning(..., lora=options.extra.lora_argument())

        ftaccum.run_script(main, extra=Options, model="bert-base-uncased", train_data="train.csv")
    """

    def load(self, model_class: Any) -> tuple[Any, Any]:
        """Return the model and its tokenizer.

        Args:
            model_class: an auto class of Transformers, such as `AutoModel`.

        Raises:
            SettingsError: if one of them cannot be loaded.
        """
        # Imported here, so that a script shows its help without them.
        from transformers import AutoTokenizer

        from .model_source import ModelSource
        from .quantization import faults_of_quantization

        has_adapters = self.lora_argument() is not None
        bits = {"load_in_4bit": self.load_in_4bit, "load_in_8bit": self.load_in_8bit}
        refuse(faults_of_quantization(**bits, has_adapters=has_adapters))
        named = ModelArguments(**{f.name: getattr(self, f.name) for f in fields(ModelArguments)})
        return ModelSource(named, model_class, AutoTokenizer, {}, self.dtype, **bits).load()

    def read(self, columns: Sequence[str]) -> "dict[str, Dataset]":
        """Return the rows by argument of `test_fine_tuning`: `train_data`, and `val_data` if it is given.

        Args:
            columns: columns in which each row must have a text.

        Raises:
            DataError: if the rows cannot be read, lack a column, or have no text in it.
            SettingsError: if there is a limit on validation rows, but no `val_data`.
        """
        from ..data.text_columns import check_column
        from .rows import read_named

        refuse(faults_of_val_data(self))
        given = ["train_data"] if self.val_data is None else ["train_data", "val_data"]
        options = ReadingOptions(delimiter=self.delimiter, encoding=self.encoding)
        rows = {argument: read_named(self, argument, options, text_columns=columns) for argument in given}
        for argument, each in rows.items():
            for column in columns:
                check_column(each, argument, column)
                _check_texts(each[column], argument, column)
        return rows


def _check_texts(texts: Sequence[Any], argument: str, column: str) -> None:
    for n, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"In `{argument}`, row {n} has no text in the column {column!r}. Remove the row.")
