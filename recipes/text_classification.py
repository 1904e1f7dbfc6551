"""Fine-tunes a text classifier with exact gradient accumulation.

    python recipes/text_classification.py                          # packaged encoder and film reviews
    python recipes/text_classification.py --config recipes/text_classification.yaml --learning_rate 5e-5
    python recipes/text_classification.py --model bert-base-uncased --train_data nyu-mll/glue:sst2 \\
        --text_column sentence --batch_size 16 --effective_batch_size 256
    python recipes/text_classification.py --train_data train.csv --val_data val.csv
    accelerate launch --config_file recipes/two_cpu_processes.yaml recipes/text_classification.py

Any model that `AutoModelForSequenceClassification` loads; CSV, JSON or Parquet files or hub data with a text and a
label column. What it saves in OUTPUT_DIR/model loads with `pipeline("text-classification", model=...)`.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import PartialState

import packaged
from ftaccum import ClassificationMetrics, DataError, SettingsError, test_fine_tuning
from ftaccum.flags import parse
from ftaccum.settings import Recipe, Runtime, checked
from ftaccum.sources import class_names, load_model, read_rows


@dataclass
class Sources:
    """What to fine-tune on what."""

    model: str = field(default=str(packaged.MINILM), metadata={"help": "folder or hub name of the model"})
    train_data: str = field(
        default=str(packaged.MOVIES_TRAIN), metadata={"help": "CSV, JSON or Parquet file, or hub name[:config]"}
    )
    val_data: str | None = field(
        default=None, metadata={"help": "the same for validation; none: a share of the training rows is held out"}
    )
    text_column: str = field(default="text", metadata={"help": "column of the texts"})
    label_column: str = field(default="label", metadata={"help": "column of the classes, as names or numbers"})
    max_train_rows: int | None = field(default=None, metadata={"help": "train on the first so many rows; none: all"})


def main(arguments: list[str]) -> None:
    sources, recipe, runtime = parse([Sources, Recipe, Runtime], arguments, description=__doc__ or "")
    settings = asdict(recipe) | asdict(runtime)
    checked(settings)  # before anything is loaded

    if sources.train_data == str(packaged.MOVIES_TRAIN) and sources.val_data is None:
        sources.val_data = str(packaged.MOVIES_VAL)
    columns = {sources.text_column: "text", sources.label_column: "label"}
    train = read_rows(sources.train_data, columns=columns)
    if sources.max_train_rows is not None:
        train = train.select(range(min(sources.max_train_rows, len(train))))
    val = read_rows(sources.val_data, split="validation", columns=columns) if sources.val_data else None
    model, tokenizer = load_model("text-classification", sources.model, class_names(train))

    result = test_fine_tuning(
        model,
        train_data=train,
        val_data=val,
        tokenizer=tokenizer,
        compute_metrics=ClassificationMetrics() if val is not None or recipe.validation_split else None,
        **settings,
    )
    if PartialState().is_main_process:
        if result.metrics and result.metrics[-1]:
            print(f"Held-out accuracy: {result.metrics[-1]['accuracy']:.1%}")
        if runtime.output_dir:
            print(f"Model, ledger and result: {Path(runtime.output_dir).resolve()}")
    PartialState().destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (SettingsError, DataError) as error:
        sys.exit(f"text_classification: {error}")
