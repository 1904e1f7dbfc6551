"""Fine-tune a text classifier with exact gradient accumulation.

    python recipes/text_classification.py                          # packaged encoder and film reviews
    python recipes/text_classification.py --config recipes/text_classification.yaml --learning_rate 5e-5
    python recipes/text_classification.py --model bert-base-uncased --train_data nyu-mll/glue:sst2 \\
        --text_columns sentence --batch_size 16 --effective_batch_size 256
    python recipes/text_classification.py --train_data train.csv --val_data val.csv
    accelerate launch --config_file recipes/two_cpu_processes.yaml recipes/text_classification.py

The recipe takes any model that `AutoModelForSequenceClassification` loads, and CSV, JSON or Parquet files or Hub data
sets with a text and a label column. The saved model in OUTPUT_DIR/model loads with `pipeline("text-classification",
model=...)`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState

import packaged
from ftaccum import DataError, SettingsError, test_fine_tuning
from ftaccum.apps.help import HelpPage
from ftaccum.apps.parser import parse
from ftaccum.arguments import parse_settings
from ftaccum.settings.recipe import Recipe
from ftaccum.settings.runtime import Runtime
from ftaccum.tasks.arguments import TrainArguments
from ftaccum.tasks.load import load

_PAGE = HelpPage("python recipes/text_classification.py [options]", __doc__ or "")


@dataclass
class Sources(TrainArguments):
    """Model and data: the arguments of `ftaccum train`, with the packaged model and rows as defaults."""

    model: str = field(default=str(packaged.MINILM), metadata={"help": "folder or hub name of the model"})
    train_data: str = field(
        default=str(packaged.MOVIES_TRAIN), metadata={"help": "CSV, JSON or Parquet file, or hub name[:config]"}
    )

    def __post_init__(self) -> None:
        if self.train_data == str(packaged.MOVIES_TRAIN) and self.val_data is None:
            self.val_data = str(packaged.MOVIES_VAL)


def main(arguments: list[str]) -> None:
    sources, recipe, runtime = parse([Sources, Recipe, Runtime], arguments, page=_PAGE)
    settings = vars(recipe) | vars(runtime)
    parse_settings(settings)  # before anything is loaded
    loaded = load(sources, settings)

    result = test_fine_tuning(**loaded.arguments(), **settings)

    if PartialState().is_main_process:
        if result.metrics and result.metrics[-1]:
            # The saved model is that of the best or the last epoch.
            losses = result.val_loss_history
            epoch = losses.index(min(losses)) if recipe.restore_best_weights else -1
            print(f"Held-out accuracy: {result.metrics[epoch]['accuracy']:.1%}")
        if runtime.output_dir:
            print(f"Model, ledger and result: {Path(runtime.output_dir).resolve()}")
    PartialState().destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (SettingsError, DataError) as error:
        print(f"text_classification: {error}", file=sys.stderr)
        sys.exit(2)
