"""The command `ftaccum`: a thin front to the Python functions, with options named as their arguments."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from .errors import DataError, SettingsError
from .planning import PlanArguments, plan
from .settings import Recipe, Runtime

_USAGE = """usage: ftaccum COMMAND [options]

Fine-tuning where gradient accumulation is exactly a large batch.

commands:
  train   fine-tune a model on files or hub data
  plan    the arithmetic of a run: k, updates, remainder

`ftaccum COMMAND --help` lists a command's options. On several processes: `accelerate launch -m ftaccum train …`.
"""

_BAD_INPUT = 2


@dataclass
class TrainArguments:
    """What to train on what."""

    model: str = field(default="", metadata={"help": "folder or hub name of the model (needed)"})
    train_data: str = field(
        default="", metadata={"help": "CSV, JSON or Parquet file, saved folder or hub name[:config] (needed)"}
    )
    val_data: str | None = field(default=None, metadata={"help": "the same for validation; none: some are held out"})
    task: str = field(default="text-classification", metadata={"help": "text-classification or causal-lm"})
    text_column: str = field(default="text", metadata={"help": "column of the texts"})
    label_column: str = field(default="label", metadata={"help": "column of the classes"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit status: 0, or 2 for bad input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"train": _train, "plan": _plan}
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if words else _BAD_INPUT
    if words[0] not in commands:
        print(f"ftaccum: there is no command {words[0]!r}.\n\n{_USAGE}", end="", file=sys.stderr)
        return _BAD_INPUT
    try:
        commands[words[0]](words[1:])
    except (SettingsError, DataError) as error:
        print(f"ftaccum {words[0]}: {error}", file=sys.stderr)
        return _BAD_INPUT
    return 0


def _plan(words: Sequence[str]) -> None:
    from .flags import parse

    (given,) = parse([PlanArguments], words, prog="ftaccum plan", description="The arithmetic of a run. Loads nothing.")
    print(plan(**asdict(given)))


def _train(words: Sequence[str]) -> None:
    from .flags import parse

    description = "Fine-tunes a model. Bad input is told before anything is loaded, with exit status 2."
    given, recipe, runtime = parse(
        [TrainArguments, Recipe, Runtime], words, prog="ftaccum train", description=description
    )
    needed = [name for name in ("model", "train_data") if not getattr(given, name)]
    if needed:
        raise SettingsError([f"`--{name}` is needed. `ftaccum train --help` says what it may be." for name in needed])

    # Only now what takes seconds to import.
    from .fine_tuning import test_fine_tuning
    from .metrics import ClassificationMetrics
    from .settings import checked
    from .sources import class_names, load_model, read_rows

    settings = asdict(recipe) | asdict(runtime)
    checked(settings)
    classifies = given.task == "text-classification"
    columns = {given.text_column: "text"} | ({given.label_column: "label"} if classifies else {})
    train = read_rows(given.train_data, columns=columns)
    val = None if given.val_data is None else read_rows(given.val_data, split="validation", columns=columns)
    model, tokenizer = load_model(given.task, given.model, class_names(train) if classifies else ())
    metrics = ClassificationMetrics() if classifies and (val is not None or recipe.validation_split) else None
    test_fine_tuning(model, train_data=train, val_data=val, tokenizer=tokenizer, compute_metrics=metrics, **settings)
